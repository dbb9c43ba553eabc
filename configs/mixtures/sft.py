"""Supervised fine-tuning: the data sets of the paper's Table 8, 12.5 million text, image and video samples.

The table states no sizes or weights, so every sample is used once per epoch. Its entries "Youtube" (which
cites LanguageBind without naming a part of it) and "etc." cannot be identified and are omitted, and
LRV-Instruction, listed twice, is included once. If a data set's format is not one of docs/data.md, the path is
that of the converted file. Sizes are of the training part unless noted otherwise.
"""

from __future__ import annotations

from configs.mixtures import PublicSet

_HUB = "https://huggingface.co/datasets"
_CONVERT = "custom format: convert to LLaVA JSON lines"

SETS: tuple[PublicSet, ...] = (
    PublicSet(
        name="llava_instruct", path="llava_instruct/llava_v1_5_mix665k.json",
        url=f"{_HUB}/liuhaotian/LLaVA-Instruct-150K", samples=665_298,
        note="images come from COCO, GQA, OCR-VQA, TextVQA and Visual Genome",
    ),
    PublicSet(
        name="idefics2_sft", path="the_cauldron/train.jsonl", url=f"{_HUB}/HuggingFaceM4/the_cauldron", samples=None,
        note=f"parquet with `texts` of user and assistant; {_CONVERT}",
    ),
    PublicSet(
        name="msr_vtt", path="msr_vtt/train.jsonl",
        url="https://www.microsoft.com/en-us/research/publication/"
        "msr-vtt-a-large-video-description-dataset-for-bridging-video-and-language/",
        samples=200_000, note=f"sentences of all 10,000 clips; {_CONVERT}",
    ),
    PublicSet(
        name="image_paragraphs", path="image_paragraphs/train.jsonl",
        url="https://cs.stanford.edu/people/ranjaykrishna/im2p/index.html", samples=19_551,
        note=f"all parts; images of Visual Genome; {_CONVERT}",
    ),
    PublicSet(
        name="sharegpt4v_100k", path="sharegpt4v/sharegpt4v_instruct_gpt4-vision_cap100k.json",
        url=f"{_HUB}/Lin-Chen/ShareGPT4V", samples=None, note="about 100,000 captions",
    ),
    PublicSet(
        name="clevr", path="clevr/train.jsonl", url="https://cs.stanford.edu/people/jcjohns/clevr/", samples=699_989, note=_CONVERT
    ),
    PublicSet(name="nlvr", path="nlvr/train.jsonl", url="https://lil.nlp.cornell.edu/nlvr/", samples=None, note=_CONVERT),
    PublicSet(
        name="visual_mrc", path="visual_mrc/train.jsonl", url="https://github.com/nttmdlab-nlp/VisualMRC", samples=30_562,
        note=f"all parts; {_CONVERT}",
    ),
    PublicSet(
        name="activitynet_qa", path="activitynet_qa/train.jsonl", url="https://github.com/MILVLG/activitynet-qa",
        samples=32_000, note=f"videos from ActivityNet; {_CONVERT}",
    ),
    PublicSet(
        name="llava_onevision_images", path="llava_onevision", url=f"{_HUB}/lmms-lab/LLaVA-OneVision-Data", samples=None,
        note="parquet is read directly; some subsets may be archives",
    ),
    PublicSet(
        name="ivqa", path="ivqa/train.jsonl", url="https://antoyang.github.io/just-ask.html", samples=None,
        note=f"10,000 clips of all parts, of HowTo100M; {_CONVERT}",
    ),
    PublicSet(
        name="msrvtt_qa", path="msrvtt_qa/train.jsonl", url="https://github.com/xudejing/video-question-answering",
        samples=158_581, note=f"clips of MSR-VTT; {_CONVERT}", media_root="msr_vtt",
    ),
    PublicSet(
        name="stem_qa", path="stem_qa/train.jsonl", url=f"{_HUB}/stemdataset/STEM", samples=1_073_146,
        note=f"all parts; answers of the test part are not released; {_CONVERT}",
    ),
    PublicSet(
        name="dvqa", path="dvqa/train.jsonl", url="https://github.com/kushalkafle/DVQA_dataset", samples=2_325_316, note=_CONVERT
    ),
    PublicSet(name="st_vqa", path="st_vqa/train.jsonl", url="https://rrc.cvc.uab.es/?ch=11", samples=None, note=_CONVERT),
    PublicSet(
        name="synthdog_en", path="synthdog_en/train.jsonl", url=f"{_HUB}/naver-clova-ix/synthdog-en", samples=None, note=_CONVERT
    ),
    PublicSet(
        name="textocr_gpt4v", path="textocr_gpt4v/llava.jsonl", url=f"{_HUB}/jimmycarter/textocr-gpt4v", samples=None,
        note=f"about 25,000 captions in its train.jsonl; images of TextOCR; {_CONVERT}",
    ),
    PublicSet(
        name="mtwi", path="mtwi/train.jsonl", url="https://tianchi.aliyun.com/competition/entrance/231684/introduction",
        samples=None, note=_CONVERT,
    ),
    PublicSet(name="science_qa", path="science_qa/train.jsonl", url="https://scienceqa.github.io", samples=12_726, note=_CONVERT),
    PublicSet(name="vqa_v2", path="vqa_v2/train.jsonl", url="https://visualqa.org", samples=443_757, note=_CONVERT),
    PublicSet(name="viquae", path="viquae/train.jsonl", url=f"{_HUB}/PaulLerner/viquae_dataset", samples=None, note=_CONVERT),
    PublicSet(
        name="visual_dialog", path="visual_dialog/train.jsonl", url="https://visualdialog.org", samples=123_287,
        note=f"dialogs of ten questions; {_CONVERT}",
    ),
    PublicSet(
        name="gqa", path="gqa/train.jsonl", url="https://cs.stanford.edu/people/dorarad/gqa/", samples=943_000,
        note=f"the balanced part; {_CONVERT}",
    ),
    PublicSet(
        name="chart_qa", path="chart_qa/train.jsonl", url="https://github.com/vis-nlp/ChartQA", samples=28_299,
        note=f"the table says ChatQA and cites ChartQA's authors; {_CONVERT}",
    ),
    PublicSet(
        name="geo170k", path="geo170k/train.jsonl", url=f"{_HUB}/Luckyjhg/Geo170K", samples=177_457,
        note="LLaVA format: concatenate qa_tuning (117,205) and alignment (60,252)",
    ),
    PublicSet(
        name="lrv_instruction", path="lrv_instruction/train.jsonl", url="https://github.com/FuxiaoLiu/LRV-Instruction",
        samples=None, note=f"images of Visual Genome; {_CONVERT}",
    ),
    PublicSet(
        name="refcoco", path="refcoco/train.jsonl", url="https://github.com/lichengunc/refer", samples=120_624,
        note=f"images of COCO; {_CONVERT}",
    ),
    PublicSet(name="doc_vqa", path="doc_vqa/train.jsonl", url="https://www.docvqa.org", samples=39_463, note=_CONVERT),
    PublicSet(name="geo_qa", path="geo_qa/train.jsonl", url="https://github.com/chen-judge/GeoQA", samples=None, note=_CONVERT),
    PublicSet(
        name="kvqa", path="kvqa/train.jsonl", url="https://malllabiisc.github.io/resources/kvqa/", samples=183_007,
        note=f"all parts; the table cites OK-VQA for it; {_CONVERT}",
    ),
    PublicSet(
        name="cambrian_1375k", path="cambrian/train.jsonl", url=f"{_HUB}/nyu-visionx/Cambrian-10M", samples=None,
        note="about 1,375,000: the sources of Cambrian7M_withsystemprompt that VILA's "
        "data_prepare/sft/preprocess_cambrian.py selects",
    ),
    PublicSet(
        name="ai2d", path="ai2d/train.jsonl", url="https://prior.allenai.org/projects/diagram-understanding", samples=None,
        note=_CONVERT,
    ),
    PublicSet(name="shikra", path="shikra/train.jsonl", url="https://github.com/shikras/shikra", samples=None, note=_CONVERT),
    PublicSet(
        name="unimm_chat", path="unimm_chat/train.jsonl", url=f"{_HUB}/Yirany/UniMM-Chat", samples=None,
        note=f"images of COCO; {_CONVERT}",
    ),
    PublicSet(
        name="svit", path="svit/train.jsonl", url=f"{_HUB}/BAAI/SVIT", samples=None,
        note="about 4.2 million, by its authors' count of pairs; its licence must be accepted; "
        "format/llava-v1.5 is in LLaVA format; images of Visual Genome",
    ),
    PublicSet(
        name="mmc_instruction", path="mmc_instruction/train.jsonl", url="https://github.com/FuxiaoLiu/MMC", samples=None,
        note=f"about 600,000; {_CONVERT}",
    ),
    PublicSet(
        name="m4_instruct_images", path="m4_instruct/images.jsonl", url=f"{_HUB}/lmms-lab/M4-Instruct-Data", samples=None,
        note="m4_instruct_annotations.json",
    ),
    PublicSet(
        name="m4_instruct_video", path="m4_instruct/video.jsonl", url=f"{_HUB}/lmms-lab/M4-Instruct-Data", samples=None,
        note="m4_instruct_video.json; its videos come from LLaVA-Hound",
    ),
    PublicSet(
        name="wit", path="wit/train.jsonl", url="https://github.com/google-research-datasets/wit", samples=None,
        note=f"about 37.6 million image-text pairs, the part used by the paper is not stated; {_CONVERT}",
    ),
)  # fmt: skip
