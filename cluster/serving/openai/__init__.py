"""One front: HTTP as OpenAI's API has it, over the inference service. A file for each family of calls."""
