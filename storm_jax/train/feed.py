"""From data sources to the devices of a mesh."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from storm_jax.config import RunConfig
from storm_jax.data.rows import RowShape
from storm_jax.media.reader import MediaReader
from storm_jax.media.workers import WorkerPool
from storm_jax.models.storm import VisualShape
from storm_jax.sharding import batch_sharding
from storm_jax.train.skip_log import SkipLog


def place(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows to global arrays over the mesh."""
    return {
        name: jax.make_array_from_process_local_data(batch_sharding(mesh, array), array)
        for name, array in arrays.items()
    }


def visual_shape(shape: RowShape) -> VisualShape:
    return VisualShape(shape.num_groups, shape.compression.spatial_pool)


def process_share() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def media_reader(config: RunConfig, pool: WorkerPool, log: SkipLog) -> MediaReader:
    return MediaReader(pool, config.model.vision.image_size, config.data.frames, log.lasting)
