"""transformers' own server and continuous batching answer with the tokens of generate."""

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.interop.environments import Installed, environment_variables, installed
from tests.interop.models import NEW_TOKENS, PROMPTS, Checkpoint


pytestmark = pytest.mark.interop
PROGRAM = Path(__file__).parent / "programs" / "continuous_batching.py"
CHAT = [{"role": "user", "content": "What is a list?"}]
IN_BATCHES = ("--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64")


@contextmanager
def server(environment: Installed, log: Path, *command: object) -> Iterator[str]:
    """The address of a server that this command starts; it is ended afterwards."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program, *arguments = map(str, command)
    options = ("--device", "cpu", "--dtype", "float32", "--port", str(port))
    with log.open("w") as output:
        process = subprocess.Popen(
            [environment.folder / "bin" / program, *arguments, *options],
            env=environment_variables(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(process, f"http://localhost:{port}/health", log)
            yield f"http://localhost:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen, address: str, log: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server does not answer: {log.read_text()[-4000:]}")


def ask(address: str, path: str, **request) -> dict:
    """The answer to a request of the OpenAI API, greedily decoded."""
    body = json.dumps({"max_tokens": NEW_TOKENS, "temperature": 0, **request}).encode()
    sent = urllib.request.Request(f"{address}{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(sent, timeout=300) as answer:
        return json.load(answer)


def text_of(checkpoint: Checkpoint, tokens: list[int]) -> str:
    return checkpoint.tokenizer.decode(tokens, skip_special_tokens=True)


def check_answers(checkpoint: Checkpoint, address: str) -> None:
    """Completions of all prompts, and a chat."""
    for prompt, tokens in zip(PROMPTS, checkpoint.answers.tokens, strict=True):
        answer = ask(address, "/v1/completions", model=str(checkpoint.folder), prompt=prompt)
        assert answer["choices"][0]["text"] == text_of(checkpoint, tokens)
    ids = checkpoint.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    stop = {"max_new_tokens": NEW_TOKENS, "eos_token_id": checkpoint.tokenizer.eos_token_id}
    tokens = checkpoint.model.generate(torch.tensor([ids]), do_sample=False, **stop)[0, len(ids) :]
    answer = ask(address, "/v1/chat/completions", model=str(checkpoint.folder), messages=CHAT)
    assert answer["choices"][0]["message"]["content"] == text_of(checkpoint, tokens.tolist())


@pytest.mark.parametrize(("how", "options"), [("one by one", ()), ("continuous batching", IN_BATCHES)])
def test_our_server_answers_with_the_tokens_of_generate(how, options, llama, record, tmp_path):
    environment = installed("serve")
    with server(environment, tmp_path / "log", "moe-hf", "serve", llama.folder, *options) as address:
        check_answers(llama, address)
    record(environment, f"`moe-hf serve` on our folder, {how}", f"{len(PROMPTS)} completions and a chat equal")


def test_transformers_server_answers_for_an_export_with_the_tokens_of_generate(native, record, tmp_path):
    environment, checkpoint = installed("serve"), native("mixtral")
    with server(environment, tmp_path / "log", "transformers", "serve", checkpoint.folder) as address:
        check_answers(checkpoint, address)
    record(environment, "`transformers serve` on an export to mixtral", f"{len(PROMPTS)} completions and a chat equal")


def test_transformers_server_cannot_load_a_class_that_is_not_its_own(llama, record):
    environment = installed("serve")
    done = environment.run(
        "transformers", "serve", llama.folder, "--trust-remote-code", "--device", "cpu", seconds=300
    )
    said = "has no attribute MoEForCausalLM"
    assert done.returncode and said in done.stderr
    record(environment, "`transformers serve --trust-remote-code` on our folder", f"does not run: transformers {said}")


def test_continuous_batching_of_our_folder_gives_the_tokens_of_generate(llama, record, tmp_path):
    environment = installed("serve")
    answers = llama.write_answers(tmp_path / "answers.json")
    environment.output("python", PROGRAM, llama.folder, answers, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == llama.answers.tokens
    record(environment, "`generate_batch`, all prompts at once, our folder", "tokens equal")
