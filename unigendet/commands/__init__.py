"""One module per command: ``add`` describes it to the parser, ``run`` carries it out."""
