"""A sentence encoder with random weights, for the tests of explanations."""

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "soft", "edges", "hard", "pale", "ink"]


def write_encoder(folder, **config):
    """Write a BERT of two layers and its tokenizer as transformers saves them; it knows five words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    wide = {"vocab_size": len(WORDS), "max_position_embeddings": 12, "initializer_range": 1.0}
    BertModel(BertConfig(**sizes, **wide, **config)).save_pretrained(folder)
