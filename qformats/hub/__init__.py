"""The Hub: checkpoints read where they lie, pulled and pushed. ``huggingface_hub`` is the client, imported only when it is needed.

``names``: addresses. ``client``: the calls and their errors. ``source``: bytes by range requests. ``opening``: a repository as a
checkpoint. ``pull``, ``push`` and ``card``: files down, files up, and what is said of them.
"""
