"""llama.cpp's own converter, which learns the name of our tokenizer: LLAMA_CPP FOLDER --outfile FILE --outtype f32.

llama.cpp knows how tokenizers split text from a list of published ones, by a hash that includes the vocabulary. One that
was trained here is not on it; it splits as GPT-2's does. Whoever converts a published model needs no such help.
"""

import runpy
import sys
from pathlib import Path


if __name__ == "__main__":
    root = Path(sys.argv.pop(1))
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    runpy.run_path(str(root / "convert_hf_to_gguf.py"), run_name="__main__")
