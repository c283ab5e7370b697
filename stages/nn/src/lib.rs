//! Qwen3, SASRec, beam search over a catalogue, optimiser and trainer. The only home of candle.

pub mod chat;
pub mod cpu;
pub mod encoder;
pub mod error;
pub mod generate;
pub mod nearest;
mod parts;
pub mod qwen3;
pub mod sasrec;
pub mod tokenizer;
pub mod train;

pub use error::Error;
pub use tokenizer::Tokenizer;
