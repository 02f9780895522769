"""Keeps `make test` from fetching transformers' tests, and knows the marks that they carry."""

UPSTREAM_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "run_first",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config):
    for name in UPSTREAM_MARKERS:
        config.addinivalue_line("markers", f"{name}: transformers' own")


def pytest_ignore_collect(collection_path, config):
    # Collecting the tests already downloads them.
    if collection_path.name.startswith("test_") and config.option.markexpr != "conformance":
        return True
    return None
