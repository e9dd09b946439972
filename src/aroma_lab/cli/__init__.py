"""The laboratory's commands; `aroma.cli` finds them through the entry points of the distribution."""
