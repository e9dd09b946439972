"""What a trial's process has imported and set before it is forked, and `run_trial`, which it calls."""

from importlib import import_module

from aroma.cli.quiet import quiet

from ..run.machine import git_revision, keep_freed_memory

quiet()  # before the imports that print
run_trial = import_module("aroma_lab.run.run").run_trial
git_revision()  # of the source that is imported here, whatever becomes of the files
keep_freed_memory()
