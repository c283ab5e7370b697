//! Qwen3, SASRec, beam search over a catalogue, optimiser and trainer. The only home of candle.
