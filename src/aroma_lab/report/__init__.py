"""Tables from run folders: every number traceable, nothing that failed left out."""
