"""Supervised fine-tuning: the sets of the paper's Table 8, 12.5 million samples of text, images and video.

The table has no sizes and no weights, so every sample comes once an epoch; its entries "Youtube"
(it cites LanguageBind, and no part of it) and "etc." cannot be identified and are left out, and
LRV-Instruction, which it lists twice, is here once. Where a set has another format than docs/data.md
describes, the path is where its conversion is expected. Sizes are those of the training part where
the note does not say otherwise.
"""

from __future__ import annotations

from configs.mixtures import PublicSet

_HUB = "https://huggingface.co/datasets"
_CONVERT = "its own format: convert to LLaVA JSON lines"

SETS: tuple[PublicSet, ...] = (
    PublicSet(
        "llava_instruct", "llava_instruct/llava_v1_5_mix665k.json",
        f"{_HUB}/liuhaotian/LLaVA-Instruct-150K", 665_298,
        "images come from COCO, GQA, OCR-VQA, TextVQA and Visual Genome",
    ),
    PublicSet(
        "idefics2_sft", "the_cauldron/train.jsonl", f"{_HUB}/HuggingFaceM4/the_cauldron", None,
        f"parquet with `texts` of user and assistant; {_CONVERT}",
    ),
    PublicSet(
        "msr_vtt", "msr_vtt/train.jsonl",
        "https://www.microsoft.com/en-us/research/publication/"
        "msr-vtt-a-large-video-description-dataset-for-bridging-video-and-language/",
        200_000, f"sentences of all 10,000 clips; {_CONVERT}",
    ),
    PublicSet(
        "image_paragraphs", "image_paragraphs/train.jsonl",
        "https://cs.stanford.edu/people/ranjaykrishna/im2p/index.html", 19_551,
        f"all parts; images of Visual Genome; {_CONVERT}",
    ),
    PublicSet(
        "sharegpt4v_100k", "sharegpt4v/sharegpt4v_instruct_gpt4-vision_cap100k.json",
        f"{_HUB}/Lin-Chen/ShareGPT4V", None, "about 100,000 captions",
    ),
    PublicSet(
        "clevr", "clevr/train.jsonl", "https://cs.stanford.edu/people/jcjohns/clevr/", 699_989, _CONVERT
    ),
    PublicSet("nlvr", "nlvr/train.jsonl", "https://lil.nlp.cornell.edu/nlvr/", None, _CONVERT),
    PublicSet(
        "visual_mrc", "visual_mrc/train.jsonl", "https://github.com/nttmdlab-nlp/VisualMRC", 30_562,
        f"all parts; {_CONVERT}",
    ),
    PublicSet(
        "activitynet_qa", "activitynet_qa/train.jsonl", "https://github.com/MILVLG/activitynet-qa",
        32_000, f"videos from ActivityNet; {_CONVERT}",
    ),
    PublicSet(
        "llava_onevision_images", "llava_onevision", f"{_HUB}/lmms-lab/LLaVA-OneVision-Data", None,
        "parquet is read as it is; some of its subsets may be archives",
    ),
    PublicSet(
        "ivqa", "ivqa/train.jsonl", "https://antoyang.github.io/just-ask.html", None,
        f"10,000 clips of all parts, of HowTo100M; {_CONVERT}",
    ),
    PublicSet(
        "msrvtt_qa", "msrvtt_qa/train.jsonl", "https://github.com/xudejing/video-question-answering",
        158_581, f"clips of MSR-VTT; {_CONVERT}", media_root="msr_vtt",
    ),
    PublicSet(
        "stem_qa", "stem_qa/train.jsonl", f"{_HUB}/stemdataset/STEM", 1_073_146,
        f"all parts; answers of the test part are not released; {_CONVERT}",
    ),
    PublicSet(
        "dvqa", "dvqa/train.jsonl", "https://github.com/kushalkafle/DVQA_dataset", 2_325_316, _CONVERT
    ),
    PublicSet("st_vqa", "st_vqa/train.jsonl", "https://rrc.cvc.uab.es/?ch=11", None, _CONVERT),
    PublicSet(
        "synthdog_en", "synthdog_en/train.jsonl", f"{_HUB}/naver-clova-ix/synthdog-en", None, _CONVERT
    ),
    PublicSet(
        "textocr_gpt4v", "textocr_gpt4v/llava.jsonl", f"{_HUB}/jimmycarter/textocr-gpt4v", None,
        f"about 25,000 captions in its train.jsonl; images of TextOCR; {_CONVERT}",
    ),
    PublicSet(
        "mtwi", "mtwi/train.jsonl", "https://tianchi.aliyun.com/competition/entrance/231684/introduction",
        None, _CONVERT,
    ),
    PublicSet("science_qa", "science_qa/train.jsonl", "https://scienceqa.github.io", 12_726, _CONVERT),
    PublicSet("vqa_v2", "vqa_v2/train.jsonl", "https://visualqa.org", 443_757, _CONVERT),
    PublicSet("viquae", "viquae/train.jsonl", f"{_HUB}/PaulLerner/viquae_dataset", None, _CONVERT),
    PublicSet(
        "visual_dialog", "visual_dialog/train.jsonl", "https://visualdialog.org", 123_287,
        f"dialogs of ten questions; {_CONVERT}",
    ),
    PublicSet(
        "gqa", "gqa/train.jsonl", "https://cs.stanford.edu/people/dorarad/gqa/", 943_000,
        f"the balanced part; {_CONVERT}",
    ),
    PublicSet(
        "chart_qa", "chart_qa/train.jsonl", "https://github.com/vis-nlp/ChartQA", 28_299,
        f"the table says ChatQA and cites ChartQA's authors; {_CONVERT}",
    ),
    PublicSet(
        "geo170k", "geo170k/train.jsonl", f"{_HUB}/Luckyjhg/Geo170K", 177_457,
        "in LLaVA's form: join the lists qa_tuning (117,205) and alignment (60,252)",
    ),
    PublicSet(
        "lrv_instruction", "lrv_instruction/train.jsonl", "https://github.com/FuxiaoLiu/LRV-Instruction",
        None, f"images of Visual Genome; {_CONVERT}",
    ),
    PublicSet(
        "refcoco", "refcoco/train.jsonl", "https://github.com/lichengunc/refer", 120_624,
        f"images of COCO; {_CONVERT}",
    ),
    PublicSet("doc_vqa", "doc_vqa/train.jsonl", "https://www.docvqa.org", 39_463, _CONVERT),
    PublicSet("geo_qa", "geo_qa/train.jsonl", "https://github.com/chen-judge/GeoQA", None, _CONVERT),
    PublicSet(
        "kvqa", "kvqa/train.jsonl", "https://malllabiisc.github.io/resources/kvqa/", 183_007,
        f"all parts; the table cites OK-VQA for it; {_CONVERT}",
    ),
    PublicSet(
        "cambrian_1375k", "cambrian/train.jsonl", f"{_HUB}/nyu-visionx/Cambrian-10M", None,
        "about 1,375,000: the sources of Cambrian7M_withsystemprompt that VILA's "
        "data_prepare/sft/preprocess_cambrian.py selects",
    ),
    PublicSet(
        "ai2d", "ai2d/train.jsonl", "https://prior.allenai.org/projects/diagram-understanding", None,
        _CONVERT,
    ),
    PublicSet("shikra", "shikra/train.jsonl", "https://github.com/shikras/shikra", None, _CONVERT),
    PublicSet(
        "unimm_chat", "unimm_chat/train.jsonl", f"{_HUB}/Yirany/UniMM-Chat", None,
        f"images of COCO; {_CONVERT}",
    ),
    PublicSet(
        "svit", "svit/train.jsonl", f"{_HUB}/BAAI/SVIT", None,
        "about 4.2 million, by its authors' count of pairs; its licence must be accepted; "
        "format/llava-v1.5 is in LLaVA's form; images of Visual Genome",
    ),
    PublicSet(
        "mmc_instruction", "mmc_instruction/train.jsonl", "https://github.com/FuxiaoLiu/MMC", None,
        f"about 600,000; {_CONVERT}",
    ),
    PublicSet(
        "m4_instruct_images", "m4_instruct/images.jsonl", f"{_HUB}/lmms-lab/M4-Instruct-Data", None,
        "m4_instruct_annotations.json",
    ),
    PublicSet(
        "m4_instruct_video", "m4_instruct/video.jsonl", f"{_HUB}/lmms-lab/M4-Instruct-Data", None,
        "m4_instruct_video.json; its videos come from LLaVA-Hound",
    ),
    PublicSet(
        "wit", "wit/train.jsonl", "https://github.com/google-research-datasets/wit", None,
        f"about 37.6 million image-text pairs, of which the paper's part is not stated; {_CONVERT}",
    ),
)  # fmt: skip
