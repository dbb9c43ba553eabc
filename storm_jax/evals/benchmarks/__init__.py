"""The benchmarks, a module each: where their files are, their prompts to the letter, their groups."""

from storm_jax.evals.benchmarks import egoschema, longvideobench, mlvu, mvbench, shapes, videomme

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (videomme, egoschema, mvbench, mlvu, longvideobench, shapes)
}
