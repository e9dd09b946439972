"""Evidence: LoRA keeps the directions of its updates that lower the loss of held-out examples.

`statistics` decides, `schedule` says when checkups come and how many batches they use, `updates` touches the model.
`checkup` joins the three, `checkups` runs it in a loop and on finished adapters, and `compact` gives every matrix the
rank that it uses.
"""
