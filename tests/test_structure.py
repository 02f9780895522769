"""Laws about the source itself: layering, what travels to the Hub, the trees in the documents, sizes, docstrings."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedConfig

from moe_hf import MoEConfig, versions
from moe_hf.modeling import configuration_moe


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_hf"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROGRAMS = [
    path for name in ("training", "examples", "benchmarks", "docs") for path in sorted((ROOT / name).rglob("*.py"))
]
TRAVELLING = [path for path in sorted((PACKAGE / "modeling").glob("*.py")) if path.name != "__init__.py"]
MODELING_ORDER = [
    "config_checks",
    ("cache_names", "config_fields", "expert_plan", "routing_ids", "presets", "index_names"),
    "configuration_moe",
    ("routing", "dense_mlp", "routing_cache"),
    "dense_classes",
    ("experts", "extra_experts", "losses", "parallel_plans", "router_noise", "router_arch", "capacity", "multi_head"),
    ("token_choice", "segment_merge"),
    ("expert_choice", "soft_gates"),
    ("routers", "custom_code", "output_mixture"),
    ("routing_pass", "serving", "travelling_code"),
    "router",
    ("moe_block", "mixed_predictions", "outputs", "step_labels"),
    "dynamic_class",
    "modeling_moe",
]
# A part imports only from its own layer and those before, and no two parts import each other.
LAYERS = [
    {"modeling"},
    {"auto_classes", "versions"},
    {"errors"},
    {
        "resources",
        "dtypes",
        "gguf_files",
        "config_files",
        "dense_sources",
        "checksums",
        "saving",
        "weight_files",
        "weight_writer",
        "router_outputs",
        "data",
        "batching",
        "metrics",
        "library_tasks",
        "augmentation",
        "answers",
    },
    {"kernels", "chat"},
    {"unwrapping"},
    {"upcycling", "finetuning", "interchange", "inspection", "extraction", "domain_mixture", "weight_checks"},
    {"reporting", "planning", "conversion", "inference"},
    {"training_plan"},
    {"hub", "source_folders", "streaming"},
    {"trainer"},
    {"doctor"},
    {"cli"},
]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
# File or function: why it may be longer.
ALLOWED_LENGTH: dict[str, str] = {}


def imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def imported_modules(path: Path) -> set[str]:
    """Absolute names; `from moe_hf.x import y` gives `moe_hf.x`, `from moe_hf import y` the module that defines y."""
    names = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif node.level == 0 and node.module == "moe_hf":
            names |= {f"moe_hf.{alias.name}" for alias in node.names}
        elif node.level == 0:
            names.add(node.module)
    return names


def layer_of(part: str) -> int | None:
    return next((level for level, parts in enumerate(LAYERS) if part in parts), None)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tracked_files() -> list[str]:
    """Files of the working tree that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in listing.splitlines() if (ROOT / name).exists()]


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) != "__init__"], ids=relative)
def test_imports_point_down_the_layers(path):
    own = layer_of(part_of(path))
    assert own is not None, f"{part_of(path)} has no layer: add it to LAYERS, and to ARCHITECTURE.md"
    for name in imported_modules(path):
        top, *parts = name.split(".")
        assert top not in ("training", "examples", "benchmarks", "tests"), f"the library imports {name}"
        # What moe_hf/__init__.py itself defines, such as __version__, has no layer.
        level = layer_of(parts[0]) if top == "moe_hf" and parts else None
        assert level is None or level <= own, f"{relative(path)} imports {name}, which is above it"


def test_no_two_parts_import_each_other():
    uses = {}
    for path in MODULES:
        if path.parent == PACKAGE and path.name == "__init__.py":
            continue
        uses.setdefault(part_of(path), set()).update(
            name.split(".")[1] for name in imported_modules(path) if name.startswith("moe_hf.")
        )
    circles = [(a, b) for a in uses for b in uses[a] if a < b and a in uses.get(b, set())]
    assert circles == []


def test_modeling_is_flat():
    assert [path for path in (PACKAGE / "modeling").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize("path", TRAVELLING, ids=relative)
def test_travelling_files_import_only_torch_transformers_and_siblings_by_name(path):
    siblings = {other.stem for other in TRAVELLING}
    for node in imports(path):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            # transformers copies the files that `from .name import Name` names, and follows no other form.
            assert node.level == 1 and node.module in siblings, ast.unparse(node)
            assert all(alias.name != "*" for alias in node.names), ast.unparse(node)
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for name in names:
            top = name.split(".")[0]
            # The other two are requirements of transformers itself.
            known = top in {"torch", "transformers", "huggingface_hub", "packaging"} or top in sys.stdlib_module_names
            assert known, ast.unparse(node)


def test_modeling_files_are_layered_as_documented():
    level = {}
    for height, names in enumerate(MODELING_ORDER):
        level |= dict.fromkeys([names] if isinstance(names, str) else names, height)
    for path in TRAVELLING:
        assert path.stem in level, f"{path.stem} has no place in MODELING_ORDER"
        for node in imports(path):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                assert level[node.module] < level[path.stem], f"{path.stem} imports {node.module}"


def test_every_config_field_is_read_by_code_and_named_in_a_test():
    own = {field.name for field in dataclasses.fields(MoEConfig)} - set(PreTrainedConfig.__dataclass_fields__)
    code = "\n".join(path.read_text() for path in MODULES if path.name != "configuration_moe.py")
    config_code = (PACKAGE / "modeling" / "configuration_moe.py").read_text()
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    unread = {
        name
        for name in own
        if not re.search(rf"config\.{name}\b|\"{name}\"", code) and not re.search(rf"self\.{name}\b", config_code)
    }
    untested = {name for name in own if not re.search(rf"\b{name}\b", tests)}
    assert not unread, f"no code reads {sorted(unread)}"
    assert not untested, f"no test names {sorted(untested)}"


def public_definitions(tree: ast.Module) -> list[ast.FunctionDef | ast.ClassDef]:
    kinds = ast.FunctionDef | ast.ClassDef
    return [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


@pytest.mark.parametrize("path", MODULES + PROGRAMS, ids=relative)
def test_modules_and_public_functions_have_docstrings(path):
    tree = ast.parse(path.read_text())
    if not tree.body:
        return
    assert ast.get_docstring(tree), "the module has no docstring"
    missing = [node.name for node in public_definitions(tree) if not ast.get_docstring(node)]
    assert missing == []


@pytest.mark.parametrize("path", MODULES + PROGRAMS, ids=relative)
def test_files_and_functions_can_be_read_in_one_sitting(path):
    text = path.read_text()
    length = len(text.splitlines())
    assert length <= LONGEST_FILE or relative(path) in ALLOWED_LENGTH, f"{length} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            lines = node.end_lineno - node.lineno + 1
            lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            name = f"{relative(path)}::{node.name}"
            assert lines <= LONGEST_FUNCTION or name in ALLOWED_LENGTH, f"{node.name} has {lines} lines"


def test_allowed_lengths_are_used():
    for name in ALLOWED_LENGTH:
        path = ROOT / name.split("::")[0]
        assert "::" in name or len(path.read_text().splitlines()) > LONGEST_FILE, f"{name} needs no exception"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_state_is_tables_in_capitals(path):
    for node in ast.parse(path.read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or not isinstance(node.value, ast.List | ast.Dict | ast.Set):
            continue
        assert target.id.isupper() or target.id == "__all__", f"{target.id} is a module-level collection"


@pytest.mark.parametrize("path", MODULES + PROGRAMS + sorted((ROOT / "tests").rglob("*.py")), ids=relative)
def test_source_is_ascii(path):
    assert path.read_text().isascii()


def tree_paths(document: str) -> set[str]:
    """Paths in the fenced tree of a document: one entry a line, nesting by two spaces, a comment after two spaces."""
    text = (ROOT / document).read_text()
    match = re.search(r"<!-- tree -->\n```(?:text)?\n(.*?)\n```", text, re.DOTALL)
    assert match, f"{document} has no fenced tree after a <!-- tree --> line"
    paths, folders = set(), []
    for line in match.group(1).splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        name = re.split(r"\s{2,}", line.strip())[0]
        del folders[indent:]
        paths |= {"".join(folders) + part for part in name.split()}
        if name.endswith("/"):
            folders.append(name)
    return paths


def expected_tree(depth_of: dict[str, int]) -> set[str]:
    """What git lists, folders with a trailing slash, to the depth given by top-level folder (1 if not given)."""
    paths = set()
    for file in tracked_files():
        parts = file.split("/")
        for depth in range(1, min(len(parts), depth_of.get(parts[0], 1)) + 1):
            paths.add("/".join(parts[:depth]) + ("/" if depth < len(parts) else ""))
    return paths


@pytest.mark.parametrize(
    ("document", "depths"),
    [("README.md", {"moe_hf": 2}), ("ARCHITECTURE.md", {"moe_hf": 3, "training": 2, "examples": 2})],
    ids=["README", "ARCHITECTURE"],
)
def test_tree_in_the_document_equals_the_disk(document, depths):
    expected = {path for path in expected_tree(depths) if not path.endswith("__init__.py")}
    actual = {path for path in tree_paths(document) if not path.endswith("__init__.py")}
    assert actual - expected == set(), "named, and not on the disk"
    assert expected - actual == set(), "on the disk, and not named"


def test_names_and_make_targets_in_the_documents_exist():
    import moe_hf

    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            ast.parse(block)
        for name in re.findall(r"\bmoe_hf\.([a-zA-Z_]+)\b(?=\()", text):
            assert hasattr(moe_hf, name), f"{document} names moe_hf.{name}"
        for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
            assert target in targets, f"{document} names make {target}"
        for path in re.findall(r"\b(?:training|examples|tests|moe_hf|model_cards)/[\w./-]*\w", text):
            assert (ROOT / path).exists(), f"{document} names {path}"


def test_supported_transformers_are_the_same_everywhere():
    lowest, beyond = versions.SUPPORTED_TRANSFORMERS
    assert (lowest, beyond) == configuration_moe.SUPPORTED_TRANSFORMERS
    (required,) = re.findall(r'"transformers(>[^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert required == f">={lowest.removesuffix('.0')},<{beyond}"


@pytest.mark.parametrize("version", ["4.57.1", "5.22.0", "6.0.0"])
def test_importing_with_another_transformers_is_one_clear_sentence(version, monkeypatch):
    monkeypatch.setattr(versions.metadata, "version", lambda name: version)
    with pytest.raises(ImportError, match=f"5.23.0, < 6, and {version} is installed"):
        versions.check_installed_transformers()


def test_importing_the_package_loads_no_torch():
    code = "import sys, moe_hf, moe_hf.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModelForCausalLM; import moe_hf",
        "import moe_hf; from transformers import pipeline",
        "from moe_hf.modeling.modeling_moe import MoEModel",
    ],
)
def test_auto_classes_know_the_models_in_whatever_order_things_are_imported(first):
    code = f"""{first}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("moe_hf", text_config={{"model_type": "llama"}})
import moe_hf
assert type(config) is moe_hf.MoEConfig
assert AutoModel._model_mapping[type(config)] is moe_hf.MoEModel
assert AutoModelForCausalLM._model_mapping[type(config)] is moe_hf.MoEForCausalLM
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parts_are_found_by_attribute_without_an_import_of_their_own():
    code = "import moe_hf; print(moe_hf.hub.save_model.__name__, hasattr(moe_hf, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["save_model", "False"]
