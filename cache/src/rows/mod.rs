//! Results of single rows (an item's embedding, a user's ranking), by namespace and key. What a key stands for is the
//! caller's business.
//!
//! ```text
//! rows/<namespace>/<segment>.rows    append-only, one an attempt; the truth
//! rows/<namespace>/claims            who computes what now: locks, no content
//! rows/<namespace>/compact.lock      as long as there were compactions
//! index/<host>/rows/<namespace>.idx  key → place; built again when missing, damaged or outdated
//! ```
//!
//! # What holds
//!
//! * **Nobody waits.** Each writer appends to a segment of its own; readers merge segments and see what others append.
//! * **Nothing computed is lost.** Records are in the kernel when [`Namespace::append`] returns, so a kill costs
//!   nothing. They are on disk after [`Namespace::sync`], and meanwhile at most two seconds after they were appended,
//!   as long as more is appended: that is what a power cut may cost.
//! * **Nothing wrong is served.** Every record carries a check of all its bytes and is verified when it is read. A
//!   torn tail is as if it was never written; a damaged record is as if its row was never computed, and the ones after
//!   it are found.
//! * **Compaction** copies closed segments into a new one, places it, and only then removes them. A reader that has one
//!   open reads on; one that finds it gone looks anew. A writer's lock keeps its segment out of it.

mod claims;
mod compact;
mod held;
mod index;
mod namespace;
mod record;
mod segment;
#[cfg(test)]
mod tests;
mod transfer;
mod view;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub(crate) use held::HeldRows;
pub use namespace::{Entry, Namespace, RowRef, RowStats};
pub use transfer::Imported;

use crate::rows::segment::{SegmentId, Taking};
use crate::store::{Access, Store, host_name};
use crate::{Result, StoreError};

/// The rows of a store.
#[derive(Clone, Debug)]
pub struct RowStore {
    folder: PathBuf,
    index: PathBuf,
    access: Access,
}

impl Store {
    /// The rows kept in this store.
    pub fn rows(&self) -> RowStore {
        RowStore::at(&self.root().join("rows"), self.access)
    }
}

impl RowStore {
    /// The rows in the folder `rows` of a store that was opened before, perhaps by another process.
    pub fn at(folder: &Path, access: Access) -> RowStore {
        let index = folder.parent().unwrap_or(Path::new(".")).join("index").join(host_name()).join("rows");
        RowStore { folder: folder.to_owned(), index, access }
    }

    /// `rows/` in the store.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Names of all namespaces, sorted.
    pub fn namespaces(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(StoreError::io("list", &self.folder, error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(StoreError::while_doing("list", &self.folder))?;
            if let Ok(name) = entry.file_name().into_string()
                && is_name(&name)
                && entry.path().is_dir()
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Opens a namespace. One that does not exist is empty, and made by the first append.
    ///
    /// # Errors
    /// A name with other characters than letters, digits, `.`, `_` and `-`; a folder that cannot be read.
    pub fn namespace(&self, name: &str) -> Result<Namespace> {
        if !is_name(name) {
            return Err(StoreError::BadName { what: "a namespace of rows", name: name.to_owned() });
        }
        Namespace::open(self.folder.join(name), self.index.join(format!("{name}.idx")), self.access)
    }

    /// Removes a namespace, once a compaction under way has ended; returns whether all of it could go: what is being
    /// written at this moment, and what was claimed to be computed, stays.
    ///
    /// # Errors
    /// [`StoreError::NoLocks`]; something cannot be removed.
    pub fn drop_namespace(&self, name: &str) -> Result<bool> {
        self.namespace(name)?.remove_all()
    }
}

/// Whether somebody may be writing a segment of the namespace in this folder.
pub(crate) fn may_be_written(folder: &Path) -> bool {
    let closed = |id: &SegmentId| matches!(segment::lock_closed(folder, id), Ok(Taking::Taken(_) | Taking::Gone));
    segment::list(folder).map_or(true, |all| !all.iter().all(|(id, _)| closed(id)))
}

fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    !name.is_empty() && name.len() <= 100 && !name.starts_with('.') && name.chars().all(fits)
}
