"""One module per command: ``add`` describes it to the parser, ``run`` carries it out.

``evaluate`` only gathers commands of its own, ``evaluate_detection`` and ``evaluate_generation``. What commands share:
``common`` (options, errors, loading a model), ``inputs`` (which pictures are meant), ``sampling`` (pictures from
prompts), ``rows`` (results as they come), ``progress``.
"""
