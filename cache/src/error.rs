//! What can go wrong in the store, with the path and the cause in fields; [`StoreError::help`] says what to do.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;

/// An operation of the store that failed. Nothing was published by it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot {action} `{}`", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("no space left to {action} `{}`", path.display())]
    NoSpace { action: &'static str, path: PathBuf, source: io::Error },
    #[error("no store at `{}`", root.display())]
    Absent { root: PathBuf },
    #[error("the store `{}` was written by a newer grlm: its version is {found}, this program knows up to {supported}", root.display())]
    NewerVersion { root: PathBuf, found: u64, supported: u64 },
    #[error("`{}` does not look like a store: its VERSION holds {found:?}, not a number", root.display())]
    NotAStore { root: PathBuf, found: String },
    #[error("the store `{}` cannot be written", root.display())]
    NotWritable { root: PathBuf, source: io::Error },
    #[error("who uses `{}` cannot be told: its disk has no locks (`flock`)", path.display())]
    NoLocks { path: PathBuf },
    #[error("the store `{}` was opened for reading only", root.display())]
    OpenedForReading { root: PathBuf },
    #[error("`{}` is {what}; only files and folders can be stored", path.display())]
    Special { path: PathBuf, what: &'static str },
    #[error("the link `{}` leads back to a folder that holds it", path.display())]
    LinkLoop { path: PathBuf },
    #[error("the name of `{}` is not UTF-8", path.display())]
    NotUtf8 { path: PathBuf },
    #[error("`{}` changed while it was read", path.display())]
    Changing { path: PathBuf },
    #[error("blob {digest} is not in the store")]
    Missing { digest: Digest },
    #[error("blob {digest} is not a folder manifest: line {line} {what}")]
    BadManifest { digest: Digest, line: usize, what: &'static str },
    #[error("`{name}` is not a name of {what}: wanted letters, digits, `.`, `_` and `-`")]
    BadName { what: &'static str, name: String },
    #[error("the export of rows `{}` is damaged or cut short: {what}", path.display())]
    BadExport { path: PathBuf, what: &'static str },
    #[error("`{}` is no export of rows", path.display())]
    NotAnExport { path: PathBuf },
    #[error("`{}` is no store, and it holds other things: `{found}`", root.display())]
    Occupied { root: PathBuf, found: String },
    #[error("no {what} is called `{name}`")]
    Unknown { what: &'static str, name: String },
}

impl StoreError {
    /// Wraps an I/O error, telling "disk full" from the rest, since that has another remedy.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> StoreError {
        let path = path.to_path_buf();
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => StoreError::NoSpace { action, path, source },
            _ => StoreError::Io { action, path, source },
        }
    }

    /// For `map_err` on std and rustix calls alike.
    pub(crate) fn while_doing<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> StoreError {
        move |source| StoreError::io(action, path, source.into())
    }

    /// What the user may do about it, as a sentence fragment to stand apart from the error.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            StoreError::NoSpace { .. } => {
                "free some space (`grlm du` shows what the store holds, `grlm gc` makes it smaller), or put the store on another disk with --store".into()
            }
            StoreError::NewerVersion { .. } => "use a newer grlm, or another store with --store PATH".into(),
            StoreError::NotAStore { .. } | StoreError::Absent { .. } => "check --store (or GRLM_STORE); `grlm run` makes a store where there is none".into(),
            StoreError::Unknown { .. } => "`grlm pin` lists the pins, `grlm rows ls` the namespaces of rows".into(),
            StoreError::NotAnExport { .. } => "give a file that `grlm rows export FILE` wrote".into(),
            StoreError::Occupied { .. } => "give --store (or GRLM_STORE) a store, or an empty or new folder to make one in".into(),
            StoreError::NotWritable { .. } => {
                "a store on a read-only disk can still be read (plan, explain, verify); to run, give one of your own with --store PATH".into()
            }
            StoreError::Special { .. } => "let the stage write a plain file or folder".into(),
            StoreError::LinkLoop { .. } => "remove the link".into(),
            StoreError::NotUtf8 { .. } => "rename the file".into(),
            StoreError::Changing { .. } => "wait until the program that writes it has finished, then run again".into(),
            StoreError::Missing { .. } | StoreError::BadManifest { .. } => "run the pipeline again: the stage that made it will be repeated".into(),
            StoreError::BadExport { .. } => "rows before the damage were taken in; export again, and import that".into(),
            StoreError::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => "check the owner and the mode of that path".into(),
            StoreError::NoLocks { .. } => "end all runs on this store, and remove that folder".into(),
            StoreError::Io { .. } | StoreError::OpenedForReading { .. } | StoreError::BadName { .. } => return None,
        })
    }
}
