"""The laboratory's figures, drawn from the records that runs leave."""
