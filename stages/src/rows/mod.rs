//! Row stages: stages that work item by item, or user by user, and whose every result is kept, so that one changed
//! row costs one row and not the catalogue.
//!
//! A row stage gives three things: its rows, a [`RowKey`] for each (all that the row's result depends on), and a
//! [`RowFunction`] from a few rows to their results on one device. [`run`] does the rest:
//!
//! * looks every key up in the attempt's [`RowMemo`], and computes equal keys once;
//! * calls `make` once a device, on a thread of that device's own, and only if some row is missing: that is where
//!   weights are loaded;
//! * hands the missing rows out in small pieces, so that a slow device does not hold the others up, and appends each
//!   piece's results before that device gets its next: a kill costs at most one piece a device;
//! * where a server does the work ([`RowJob::requests`]), has so many pieces under way at all times: a slow answer
//!   holds no other up, and a kill costs what was under way;
//! * on [`StageError::OutOfMemory`] asks the function to free what it can, halves that device's piece and tries
//!   again; on [`StageError::DeviceLost`] gives the device's rows to the others;
//! * leaves alone what another process computes at this moment, and takes its results over;
//! * returns results in the order of rows, the same for any number of devices.
//!
//! # What belongs in a key
//!
//! Everything that can change the row's result, and nothing else: its content (the text to embed, the rendered
//! prompt), the model ([`StageContext::input_digest`], [`StageContext::model_identity`]) and what is done with them (dtype, pooling, decoding parameters), the
//! class of device where the last bits depend on it, and a version of the row's own that is raised when the code
//! changes what it computes. Not the row's place, id, batch or device, nor parameters that only matter afterwards
//! (`top_k` of a similarity search over embeddings).
//!
//! A result must depend on its key alone: whatever else is in the piece, and whichever device of one class computed it.
//! On CPUs that means the same bytes; the libraries of GPUs round otherwise for another number of rows.
//!
//! # Example
//!
//! ```
//! use grlm_stages::{
//!     StageContext, StageError,
//!     rows::{self, RowDevice, RowFailure, RowFunction, RowJob, RowRecipe, RowResult},
//! };
//!
//! /// Raised when the code below changes what it computes for a row.
//! const ROW_VERSION: u32 = 1;
//!
//! struct Shout<'a> {
//!     texts: &'a [String],
//! }
//!
//! impl RowFunction for Shout<'_> {
//!     fn compute(&mut self, rows: &[usize]) -> Result<Vec<(usize, RowResult)>, StageError> {
//!         let one = |&row: &usize| match self.texts[row].as_str() {
//!             "" => Err(RowFailure::new("the text is empty")),
//!             text => Ok(text.to_uppercase().into_bytes()),
//!         };
//!         Ok(rows.iter().map(|row| (*row, one(row))).collect())
//!     }
//! }
//!
//! fn shout(cx: &mut StageContext, texts: &[String], language: &str) -> Result<Vec<String>, StageError> {
//!     // What all rows share is hashed once.
//!     let recipe = RowRecipe::new("shout", ROW_VERSION).text("language", language);
//!     let keys = texts.iter().map(|text| recipe.row().text("text", text).key()).collect();
//!     let job = RowJob::new("shout", "item", keys).batch(64).max_failed_rows(1);
//!     let done = rows::run(cx, &job, |_: RowDevice| Ok(Shout { texts }))?;
//!     Ok(done.iter().map(|r| r.map_or_else(|e| e.message.clone(), |b| String::from_utf8_lossy(b).into())).collect())
//! }
//! ```
//!
//! So that `grlm plan` can say how many rows are missing, a row stage also builds its job in [`Stage::plan_rows`],
//! from the same function that [`Stage::run`] takes it from.
//!
//! [`StageContext::input_digest`]: crate::StageContext::input_digest
//! [`StageContext::model_identity`]: crate::StageContext::model_identity
//! [`Stage::plan_rows`]: crate::Stage::plan_rows
//! [`Stage::run`]: crate::Stage::run

mod digest;
mod job;
mod key;
mod memo;
mod result;
mod run;
mod share;
#[cfg(test)]
mod tests;

pub(crate) use digest::content_digest;
pub use job::{Notes, RowDevice, RowFailure, RowFunction, RowJob, RowResult};
pub use key::{RowFields, RowKey, RowRecipe};
pub use memo::{MemoryMemo, RowMemo};
pub use result::Rows;
pub use run::run;
