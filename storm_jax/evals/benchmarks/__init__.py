"""The benchmarks, one module each: file layouts, prompts (verbatim) and groups."""

from storm_jax.evals.benchmarks import (
    egoschema,
    longvideobench,
    mlvu,
    mvbench,
    ovobench,
    shapes,
    streamingbench,
    videomme,
)

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (
        videomme,
        egoschema,
        mvbench,
        mlvu,
        longvideobench,
        streamingbench,
        ovobench,
        shapes,
    )
}
