"""CTranslate2 on the size-matched BART cousin."""

from __future__ import annotations

from cousin import CTRANSLATE_FOLDER, word

from peers.base import NotSupported, Peer

COMPUTE_TYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


class CTranslate2(Peer):
    """One translator with all threads inside an operator, the whole batch at once."""

    name = "ctranslate2"
    dtypes = ("fp32", "bf16", "int8")

    def version(self) -> str:
        import ctranslate2

        return f"ctranslate2 {ctranslate2.__version__}"

    def settings(self) -> str:
        return f"compute_type {self.compute_type}, inter_threads 1, intra_threads {self.job.threads}"

    def build(self) -> None:
        import ctranslate2

        wanted = COMPUTE_TYPES[self.job.dtype]
        supported = ctranslate2.get_supported_compute_types("cpu")
        if wanted not in supported:
            raise NotSupported(f"{self.version()} has no {wanted} on this CPU (only {', '.join(sorted(supported))})")
        self.translator = ctranslate2.Translator(
            str(self.job.folder / CTRANSLATE_FOLDER),
            device="cpu",
            compute_type=wanted,
            inter_threads=1,
            intra_threads=self.job.threads,
        )
        self.compute_type = self.translator.compute_type
        self.batch = [[word(token) for token in source] for source in self.job.sources(specials=0)]

    def decode(self, steps: int) -> list[int]:
        results = self.translator.translate_batch(
            self.batch,
            beam_size=self.job.load.beam,
            num_hypotheses=1,
            no_repeat_ngram_size=self.job.load.ngram,
            min_decoding_length=steps,
            max_decoding_length=steps,
            max_input_length=0,
            max_batch_size=self.job.load.batch,
            batch_type="examples",
        )
        return [len(result.hypotheses[0]) for result in results]
