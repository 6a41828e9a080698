"""Draft trees inside vLLM's Model Runner V2: where a tree's rows are, what they attend, which path is accepted.

Nothing of vLLM is patched here. When the drafter is loaded, before anything else is built on the target model,
`attach.attach_trees` gives the target's attention layers a subclass of their own implementation and hands vLLM the
model state `TreeModelState` through its official hook `get_model_state_cls`; that one brings positions, layout and
sampler.

    table.py         what a request's tree is between two steps
    layout.py        where its rows lie in the batch that verifies it, and what the verification says
    attach.py        the one place where trees meet the loaded target
    model_state.py   vLLM's hooks: requests come, rows get positions, the sampler is replaced
    attention.py     rows of a tree attend the context and their own ancestors
    verification.py  one target token per node, and the walk that accepts a path
    compaction.py    the accepted path moves to the front of the tree's rows in the key/value cache
    layers.py        which attention layers can verify trees

The order of a step: the proposer stores trees by request slot; the next step's `prepare_attn` lays them out over the
batch's rows; attention reads that layout; the sampler walks, and hands its verdict to the compaction of the key/value
cache and to the proposer, whose context the accepted rows are.
"""
