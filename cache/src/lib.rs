//! A content-addressed store: blobs named by their BLAKE3, the records of finished actions, locks, and what
//! keeps all that small and true (gc, verify, pins). It knows no stages: an action is a key, a manifest that
//! nobody here reads, and named outputs.
//!
//! # What holds
//!
//! * **Files are the truth.** `blobs/`, `actions/`, `pins/` and `runs/` can be copied to another disk and work.
//!   Everything under `index/` is a memory of what was seen on one host and may be deleted at any time.
//! * **A record is whole or absent.** Outputs are hashed where they lie, made read-only and renamed into `blobs/`;
//!   the record is written to a temporary file and renamed last. A kill at any instruction leaves garbage that
//!   [`Store::gc`] removes, never half a result.
//! * **After a power cut** nothing wrong is believed: see [`durability`](crate::sync) for what is on disk when.
//! * **A blob is trusted by its stat signature** (device, inode, size, mtime, ctime) as this store left it, and
//!   hashed again when the signature differs. Blobs carry a modification time older than their ingestion, so any
//!   write shows, even within one clock tick. A blob that is not what its name says goes to `quarantine/`.
//! * **Results of single rows** are kept beside those of actions: see [`rows`].
//! * **Nobody waits for anybody** except for the same action. Records, blobs and index entries are written without locks.

mod blobs;
mod content;
mod digest;
mod error;
mod folder_snapshot;
mod gc;
mod hash;
mod inputs;
mod inventory;
mod limit;
mod lock;
mod materialise;
mod pins;
mod process;
mod record;
pub mod rows;
mod scratch;
mod signature;
mod signature_log;
mod stat_index;
pub mod steps;
mod store;
pub mod sync;
#[cfg(test)]
mod testing;
mod verify;
mod walk;

pub use blobs::Health;
pub use content::{Content, ContentKind, FolderEntry, FolderManifest};
pub use digest::{ActionKey, Digest, ParseDigestError};
pub use error::StoreError;
pub use gc::{Collect, Collected, FRESH, Gone, InUse};
pub use inventory::{RowUsage, StageUsage, Usage};
pub use limit::DEFAULT_LIMIT;
pub use lock::{ActionLock, Holder, SILENCE};
pub use materialise::{Materialised, Placement};
pub use pins::Pin;
pub use process::ProcessId;
pub use record::{Accepted, ActionRecord, ActionSummary, Provenance, RECORD_FORMAT};
pub use store::{Access, STORE_VERSION, Store};

pub use verify::{Finding, Flaw, Verified};

/// What fallible operations of this crate return.
pub type Result<T> = std::result::Result<T, StoreError>;
