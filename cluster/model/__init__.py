"""The dense half of Qwen2-MoE. Knows no network, no Ray and not where experts live."""
