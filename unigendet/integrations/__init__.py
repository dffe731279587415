"""Ways into other people's models: ``transformers`` (an attention implementation) and ``bagel`` (BAGEL's modules).

Each module imports what it needs, and nothing imports them: a project asks for the one it uses.
"""
