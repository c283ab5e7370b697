//! What training and generation share about text: how a sample becomes tokens, and how a history becomes the prompt
//! that goes on exactly where training left it.
//!
//! Both directions stand in [`Layout`], so that they cannot drift apart: [`Layout::sample`] lays out a sample for
//! learning; [`Layout::prompt`] and [`Layout::tid`] together give the beginning of such a sample.

mod layout;
pub mod prefixes;
mod samples;

pub use layout::{HistoryPrompt, Laid, Layout, Settings};
pub use samples::{Sample, Shape, items};
