"""Manifests against the schemas of what reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantkit.cli.deploy import Target
from quantkit.cli.main import run
from quantkit.engines.artifact import Artifact
from quantkit.engines.deploy import TARGETS, DeployOptions, write
from quantkit.errors import QuantkitError, UsageError
from quantkit.recipe import KV_CACHES
from quantkit.schemes import SCHEMES
from tests.engines.manifest_schemas import SCHEMAS, ServeConfig

ARTIFACT = Artifact(
    folder=Path("/models/SmolLM2_135M.w4"),
    schemes=(SCHEMES["w4a16-g64"],),
    kv=KV_CACHES["fp8"],
    dtype="bfloat16",
    context=2048,
    size_bytes=1,
    bits_per_weight=None,
)
FLAGS = {
    "--quantization": "compressed-tensors",
    "--kv-cache-dtype": "fp8",
    "--tensor-parallel-size": "2",
    "--max-model-len": "2048",
    "--served-model-name": "SmolLM2_135M.w4",
}


def document(target: str, folder: Path, **options: Any) -> dict[str, Any]:
    uri = None if target == "compose" else "pvc://models/w4"
    chosen = DeployOptions(**{"gpus": 2, "model_uri": uri, **options})
    return yaml.safe_load(write(target, ARTIFACT, chosen, folder).read_text())


def pairs(arguments: list[str]) -> dict[str, str]:
    assert arguments[0] == "/mnt/models"
    return dict(zip(arguments[1::2], arguments[2::2], strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_keeps_to_its_schema(target: str, tmp_path: Path) -> None:
    uris = ("pvc://models/w4", "s3://bucket/w4", "owner/name")
    for number, uri in enumerate((None,) if target == "compose" else uris):
        found = document(target, tmp_path / str(number), model_uri=uri)
        SCHEMAS[target].model_validate_json(json.dumps(found))
    assert list(SCHEMAS) == list(TARGETS) == [t.value for t in Target]


def test_compose_mounts_the_folder_and_asks_for_a_key(tmp_path: Path) -> None:
    service = document("compose", tmp_path)["services"]["vllm"]
    assert pairs(service["command"]).items() >= FLAGS.items()
    assert service["volumes"][0]["source"] == "/models/SmolLM2_135M.w4"
    assert service["environment"]["VLLM_API_KEY"].startswith("${VLLM_API_KEY:?")
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2


def test_compose_reads_no_variable_into_a_name(tmp_path: Path) -> None:
    """``$$`` is a ``$`` to compose, and any other the start of a variable."""
    odd = replace(ARTIFACT, folder=Path("/models/$HOME/${USER}-w4"))
    path = write("compose", odd, DeployOptions(), tmp_path)
    service = yaml.safe_load(path.read_text())["services"]["vllm"]
    assert service["volumes"][0]["source"] == "/models/$$HOME/$${USER}-w4"
    assert pairs(service["command"])["--served-model-name"] == "$${USER}-w4"
    assert service["environment"]["VLLM_API_KEY"].startswith("${")


def test_a_manifest_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text[:20].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(QuantkitError, match="the disk is full"):
        document("compose", tmp_path)
    assert not list(tmp_path.iterdir())


def test_kserve_names_the_storage(tmp_path: Path) -> None:
    found = document("kserve", tmp_path, replicas=(1, 3), model_uri="owner/name")
    predictor = found["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert found["metadata"]["name"] == "smollm2-135m-w4"
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (1, 3)
    assert container["env"] == [{"name": "STORAGE_URI", "value": "hf://owner/name"}]
    assert pairs(container["args"]).items() >= FLAGS.items()
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("pvc://models/a/w4", "/mnt/models/a/w4"),
        ("pvc://models", "/mnt/models"),
        ("s3://bucket/w4", {"bucket_uri": "s3://bucket/w4"}),
        ("owner/name", "owner/name"),
    ],
)
def test_ray_runs_the_llm_application(uri: str, source: object, tmp_path: Path) -> None:
    spec = document("ray", tmp_path, model_uri=uri, replicas=(1, 2))["spec"]
    config = ServeConfig.model_validate_json(json.dumps(yaml.safe_load(spec["serveConfigV2"])))
    (llm,) = config.applications[0].args.llm_configs
    assert llm.model_loading_config.model_source == source
    assert llm.engine_kwargs == {
        "generation_config": "vllm",
        "tensor_parallel_size": 2,
        "dtype": "bfloat16",
        "quantization": "compressed-tensors",
        "kv_cache_dtype": "fp8",
        "max_model_len": 2048,
    }
    cluster = spec["rayClusterConfig"]
    assert (
        cluster["rayVersion"]
        in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    )
    claims = [
        "persistentVolumeClaim" in volume
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
        for volume in group["template"]["spec"]["volumes"]
    ]
    assert any(claims) == uri.startswith("pvc://")


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ("kserve", {"model_uri": None}, "cannot see this machine's folders"),
        ("ray", {"model_uri": "ftp://x/y"}, "'ftp' is none of"),
        ("ray", {"image": "mine:latest"}, "does not begin with Ray's version"),
        ("compose", {"replicas": (1, 2)}, "one port has one copy"),
        ("compose", {"model_uri": "s3://bucket/w4"}, "compose mounts the checkpoint's own folder"),
        ("compose", {"max_context": 4096}, "--max-context 4096 is more than the model's 2048"),
        ("ray", {"max_context": 4096}, "--max-context 4096 is more than the model's 2048"),
        ("kserve", {"replicas": (3, 2)}, "fewest and most"),
        ("helm", {}, "one of compose, kserve, ray"),
    ],
)
def test_refusals(target: str, options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        document(target, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_scheme_that_vllm_does_not_run_is_refused(tmp_path: Path) -> None:
    int8_cache = replace(ARTIFACT, kv=KV_CACHES["int8"])
    with pytest.raises(UsageError, match="8-bit float caches only"):
        write("compose", int8_cache, DeployOptions(), tmp_path)


def test_names_become_labels(tmp_path: Path) -> None:
    odd = replace(ARTIFACT, folder=Path("/models/7B--" + "x" * 80))
    path = write("kserve", odd, DeployOptions(model_uri="a/b"), tmp_path)
    SCHEMAS["kserve"].model_validate_json(json.dumps(yaml.safe_load(path.read_text())))


def test_the_command_writes_and_never_replaces(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["deploy", str(tiny), "--target", "compose", "-o", str(tmp_path / "out"), "--json"]
    assert run(command) == 0
    assert json.loads(capsys.readouterr().out)["file"].endswith("compose.yaml")
    assert run(command) == 2
    assert "exists" in capsys.readouterr().err
