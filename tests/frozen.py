"""The last module that a fork server imports: no garbage is looked for among what is there by then.

A training of accelerate collects garbage, which would take longer than a tiny training, and would copy the pages that
the processes share.
"""

import gc

gc.collect()
gc.freeze()
