"""`make demo`: the main job on real text, from a dense model to a fine-tuned MoE and its controls."""
