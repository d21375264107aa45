"""Text to token ids and back: tokenizer, chat template, detokenizer, an answer's text. Knows no network and no Ray."""
