"""The parts of three public schemas that our manifests use, closed: an unknown key is refused.

Hand-written after the Compose specification (schema/compose-spec.json), KServe's
``serving.kserve.io/v1beta1`` InferenceService and KubeRay's ``ray.io/v1`` RayService CRDs, whose
own files are megabytes; pod parts after Kubernetes' core/v1. A subset: what passes here is meant to
pass there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


#: RFC 1123, as Kubernetes asks of the names of services.
Label = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$")]

# --- Compose ---------------------------------------------------------------------------------

Duration = Annotated[str, Field(pattern=r"^\d+(ms|s|m|h)$")]


class Device(Closed):
    driver: str
    count: int
    capabilities: list[str]


class Reservations(Closed):
    devices: list[Device]


class ComposeResources(Closed):
    reservations: Reservations


class ComposeDeploy(Closed):
    resources: ComposeResources


class BindMount(Closed):
    type: Literal["bind"]
    source: str
    target: str
    read_only: bool


class Healthcheck(Closed):
    test: list[str]
    interval: Duration
    timeout: Duration
    retries: int
    start_period: Duration


class ComposeService(Closed):
    image: str
    entrypoint: list[str]
    command: list[str]
    environment: dict[str, str]
    volumes: list[BindMount]
    ports: list[str]
    ipc: str
    healthcheck: Healthcheck
    restart: Literal["no", "always", "on-failure", "unless-stopped"]
    deploy: ComposeDeploy


class Compose(Closed):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    services: dict[str, ComposeService]


# --- Kubernetes core/v1 ----------------------------------------------------------------------


class Metadata(Closed):
    name: Label
    annotations: dict[str, str] = {}


class EnvironmentVariable(Closed):
    name: str
    value: str


class ContainerPort(Closed):
    containerPort: Annotated[int, Field(gt=0, lt=65536)]
    protocol: Literal["TCP", "UDP"]


class HttpGet(Closed):
    path: str
    port: int


class Probe(Closed):
    httpGet: HttpGet
    periodSeconds: Annotated[int, Field(gt=0)]
    failureThreshold: Annotated[int, Field(gt=0)]


class Resources(Closed):
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class VolumeMount(Closed):
    name: str
    mountPath: str
    readOnly: bool = False


class EmptyDir(Closed):
    medium: Literal["", "Memory"]
    sizeLimit: Quantity


class Claim(Closed):
    claimName: Label
    readOnly: bool


class Volume(Closed):
    name: Label
    emptyDir: EmptyDir | None = None
    persistentVolumeClaim: Claim | None = None


class Container(Closed):
    name: Label
    image: str
    command: list[str] = []
    args: list[str] = []
    env: list[EnvironmentVariable] = []
    ports: list[ContainerPort] = []
    readinessProbe: Probe | None = None
    startupProbe: Probe | None = None
    resources: Resources
    volumeMounts: list[VolumeMount] = []


class PodSpec(Closed):
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]


class PodTemplate(Closed):
    spec: PodSpec


# --- KServe ----------------------------------------------------------------------------------


class Predictor(PodSpec):
    minReplicas: int
    maxReplicas: int


class InferenceServiceSpec(Closed):
    predictor: Predictor


class InferenceService(Closed):
    apiVersion: Literal["serving.kserve.io/v1beta1"]
    kind: Literal["InferenceService"]
    metadata: Metadata
    spec: InferenceServiceSpec


# --- KubeRay ---------------------------------------------------------------------------------


class HeadGroup(Closed):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=0)]


class RayCluster(Closed):
    rayVersion: str
    enableInTreeAutoscaling: bool
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayServiceSpec(Closed):
    serveConfigV2: str
    rayClusterConfig: RayCluster


class RayService(Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


class ModelLoading(Closed):
    model_id: str
    model_source: str | dict[Literal["bucket_uri"], str]


class Autoscaling(Closed):
    min_replicas: int
    max_replicas: int


class Deployment(Closed):
    autoscaling_config: Autoscaling


class LlmConfig(Closed):
    """ray.serve.llm.LLMConfig."""

    model_loading_config: ModelLoading
    engine_kwargs: dict[str, Any]
    deployment_config: Deployment


class LlmArguments(Closed):
    llm_configs: list[LlmConfig]


class Application(Closed):
    name: str
    route_prefix: str
    import_path: Literal["ray.serve.llm:build_openai_app"]
    args: LlmArguments


class ServeConfig(Closed):
    applications: list[Application]


SCHEMAS: dict[str, type[Closed]] = {
    "compose": Compose,
    "kserve": InferenceService,
    "ray": RayService,
}
