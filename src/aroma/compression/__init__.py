"""The least LoRA adapter that gives the same answers: cut once, after any training, in the metric of its predictions.

`metric` is the mathematics, pure functions of arrays. `predictions` says what a model's outputs are and how far apart
two of them lie, `weights` reads and writes the adapted weights of a model, and `compress` joins the three. `callback`
calls it in a Trainer, and `files` cuts a saved adapter without its base model.
"""
