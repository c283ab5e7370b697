//! Generation: greedy, beam search over the whole vocabulary as transformers does it, and beam search over a catalogue.
//!
//! Prompts are read in one ragged batch and their beams go forward together; what a prompt gets does not depend on its
//! neighbours or on the number of threads, bit for bit (see [`crate::cpu`]). Work is shared out by prompts: every
//! thread takes its own small batch, and only where there are fewer prompts than threads do they share the products.

mod catalogue;
mod exact;
mod free;
mod greedy;
pub mod memory;
mod session;
mod trie;

pub use catalogue::{Asked, Catalogue, Found, Normalize};
pub use exact::exact;
pub use free::{Free, Hypothesis};
pub use greedy::greedy;
pub use session::{Generator, PROMPTS_ON_DEVICE};
pub use trie::{LeftOut, Node, Trie};
