"""The notebook of examples/: its code runs on a tiny model, and what it shows was put there by a run of all its cells."""

import copy
import json
import re

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from moe_hf.trainer.chats import CHAT_TEMPLATE
from tests.documents import stand_ins
from tests.documents.blocks import ROOT


NOTEBOOK = ROOT / "examples" / "smollm2_moe.ipynb"
MACHINE = re.compile(r"/(?:home|root|tmp|work|Users|usr|opt)/")


@pytest.fixture(scope="module")
def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_outputs_are_of_one_run_of_all_cells_without_an_error(cells):
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if MACHINE.search("".join(output.get("text", ())))]
    # All but the one that sets names, and the training that prints through its logs, show something.
    assert all(cell["outputs"] for cell in cells[1:])
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_its_code_runs_on_a_tiny_model(tmp_path):
    nbclient = pytest.importorskip(
        "nbclient", reason="the notebook runs with nbclient: pip install 'moe-hf[notebook]'"
    )
    pytest.importorskip("ipykernel", reason="the notebook runs with ipykernel: pip install 'moe-hf[notebook]'")
    nbformat = pytest.importorskip("nbformat")
    tokenizer = copy.deepcopy(stand_ins.tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE
    stand_ins.dense().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    chats = [
        [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}]
        for word in "abcdefghijkl"
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    own = {"SOURCE": "dense", "CHATS": "chats.jsonl", "STEPS": 2, "OUTPUT": "moe"}
    assert set(re.findall(r"^([A-Z]+) = ", parameters.source, re.MULTILINE)) == set(own)
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in own.items())
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "of which" in printed and "nats/token" in printed
    differences = [float(number) for number in re.findall(r"difference of the logits:? (\S+)", printed)]
    assert len(differences) == 3 and max(differences) <= 1e-4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config.num_experts == 4
    assert AutoConfig.from_pretrained(tmp_path / "moe-native").model_type != "moe_hf"
