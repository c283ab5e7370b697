//! The builders of training samples, one file each, and what they share: the alpaca sample.
//!
//! `rec_text` renders one item of a history; `generate` uses it too, so that a model is asked in the form in which it
//! was taught.

pub mod rec_text;
