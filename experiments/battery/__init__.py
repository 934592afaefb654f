"""The battery: what every method must have, written once and run over the catalogue, with nothing to add by hand.

    kinds        every registered kind, and which of them a config is made of
    subjects     the models that are tried: the headline arm of every study, shrunk; and a small model around every other kind
    programs     what is compiled for a subject: few programs, each of which serves several properties
    properties   what is asked of a subject
    pieces       what is asked of kinds that are no part of a model: optimizers, tasks, surgeries, sources, initialisers

`experiments.matrix` prints what comes out, and `tests/battery` is the same as tests.
"""
