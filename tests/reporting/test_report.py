"""A report is JSON, pictures, and one page that needs no network and runs nothing that came with the data."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

from moe_hf import routing_statistics, upcycle
from moe_hf.cli import app
from moe_hf.data import train_tokenizer
from moe_hf.reporting.report import report_page, write_report
from tests.tiny_models import random_ids, tiny_dense, tiny_native_moe


EVIL = "<script>window.stolen = 1</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def evil_tokenizer():
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["one two three"] * 9}), vocab_size=265)
    tokenizer.add_tokens([EVIL, '"><img src=x onerror=alert(1)>', "</div></body>"])
    return tokenizer


@pytest.fixture(scope="module")
def evil():
    """Statistics with markup as tokens, as domains and as the model's name."""
    tokenizer = evil_tokenizer()
    model = tiny_native_moe("mixtral", vocab_size=len(tokenizer))
    model.name_or_path = "<b>model</b>"
    ids = torch.tensor([[*range(40, 60), *range(len(tokenizer) - 3, len(tokenizer))]])
    data = {"<i>a</i>": [{"input_ids": ids}], "b": [{"input_ids": ids.flip(-1)}]}
    return routing_statistics(model, data, tokenizer=tokenizer, against=model)


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_text_of_tokens_domains_and_names_is_escaped(evil):
    text = report_page(evil)
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and not {"img", "i", "b"} & (set(tags) - {"b"}) and text.count("</body>") == 1
    assert EVIL not in text and "&lt;script&gt;window.stolen = 1&lt;/script&gt;" in text
    assert EVIL in page.texts and "<i>a</i>" in page.texts and "Routing of <b>model</b>" in page.texts
    spans = [attributes["data-experts"] for tag, attributes in page.tags if "data-experts" in attributes]
    assert spans == [" ".join(map(str, c)) for sample in evil.samples for c in sample.experts.T.tolist()]


def test_the_page_asks_for_nothing_from_outside(evil):
    text = report_page(evil)
    assert not re.findall(r"https?:|src=|<link|@import|url\(|fetch\(|XMLHttp", text.replace("src=x", ""))
    assert "default-src 'none'" in text
    for _, attributes in Page(text).tags:
        assert not {"src", "href"} & attributes.keys()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_colours_every_token_and_runs_no_token(evil, tmp_path):
    (tmp_path / "report.html").write_text(report_page(evil), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "report.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    page = Page(done.stdout)
    spans = [attributes for _, attributes in page.tags if "data-experts" in attributes]
    assert len(spans) == 46 and all("background: rgb(" in span["style"] for span in spans)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "img" not in {tag for tag, _ in page.tags}
    assert sum(text.startswith("expert ") and text[-1].isdigit() for text in page.texts) >= 2, "the legend"


def test_json_and_pictures_are_made_and_hold_the_figures(evil, tmp_path):
    files = write_report(evil, tmp_path)
    assert {path.name for path in files} == {
        *("routing.json", "report.html", "routing.png", "by_domain.png", "by_position.png", "by_token_class.png"),
        *("co_activation.png", "change.png"),
    }
    for path in files:
        assert path.suffix != ".png" or path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    content = json.loads((tmp_path / "routing.json").read_text())
    assert content["summary"] == evil.summary() and content["summary"]["tokens"] == 46
    for layer, expected in zip(content["layers"], evil.layers, strict=True):
        assert layer["choices"] == expected.choices.tolist() and layer["together"] == expected.together.tolist()
    assert content["samples"][0]["tokens"][-3] == EVIL


def test_many_experts_and_layers_of_different_sizes_are_shown_too(tmp_path):
    from moe_hf import MoEConfig, MoEForCausalLM
    from tests.tiny_models import tiny_config

    fields = {"num_experts": 72, "num_experts_per_layer": [72, 3, 20], "moe_intermediate_size": 8}
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), **fields)).eval()
    statistics = routing_statistics(model, [{"input_ids": random_ids()}])
    write_report(statistics, tmp_path)
    content = json.loads((tmp_path / "routing.json").read_text())
    assert "together" not in content["layers"][0] and content["layers"][0]["strongest_pairs"]
    assert [layer["num_experts"] for layer in content["layers"]] == [72, 3, 20]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["one two three four"] * 9}), vocab_size=265)
    dense = tiny_dense("llama", vocab_size=len(tokenizer))
    for name, model in {"dense": dense, "moe": upcycle(dense, num_experts=4, noise=0.1)}.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for domain in ("first", "second"):
        (root / "text" / domain).mkdir(parents=True)
        (root / "text" / domain / "a.txt").write_text(f"one two three {domain} " * 60)
    return root


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command_writes_a_report_of_each_domain_and_prints_the_layers(folders, tmp_path):
    options = ("--data", folders / "text", "--max-tokens", 50, "--block-size", 16, "--origin", folders / "dense")
    done = run(folders / "moe", *options, "--against", folders / "moe", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert content["groups"]["domain"] == ["first", "second"] and content["summary"]["tokens"] == 50
    assert content["summary"]["largest drift"] == 0 and content["summary"]["overlap with the other checkpoint"] == 1
    assert (content["model"], content["against"], content["origin"]) == ("moe", "moe", "dense")
    assert str(folders) not in (tmp_path / "out" / "report.html").read_text()
    assert "MaxVio" in done.output and "By layer" in done.output
    again = run(folders / "moe", *options, "--output", tmp_path / "out")
    assert again.exit_code == 2 and "exists" in again.stderr
    printed = run(folders / "moe", *options, "--domain", "first", "--json")
    assert json.loads(printed.stdout)["tokens"] == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "none.txt"), "No file or folder"),
        (("--max-tokens", 0), "at least 1"),
        (("--domain", "third"), "it has first, second"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_sentence_and_leave_no_folder(folders, tmp_path, options, message):
    options = options if "--data" in options else ("--data", folders / "text", *options)
    done = run(folders / "moe", *options, "--output", tmp_path / "out")
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()) and list(tmp_path.iterdir()) == []
    dense = run(folders / "dense", "--data", folders / "text", "--output", tmp_path / "out")
    assert dense.exit_code == 2 and "no MoE block" in dense.stderr and list(tmp_path.iterdir()) == []
