//! Files and folders that cannot be stored, in words: pipes and devices, links that lead nowhere, odd names.

use std::{
    io,
    path::{Path, PathBuf},
};

use grlm_cache::StoreError;

/// Something at or below a path that has no content to store.
#[derive(Debug, PartialEq, Eq)]
pub struct Odd {
    pub path: PathBuf,
    /// `is a pipe`.
    pub what: String,
    pub help: Option<String>,
}

impl Odd {
    /// Tells errors that come from what lies at `root` from those of the store.
    pub fn below(root: &Path, error: &StoreError) -> Option<Self> {
        let (path, what) = match error {
            StoreError::Special { path, what } => (path, format!("is {what}")),
            StoreError::LinkLoop { path } => (path, "is a link that leads back to a folder that holds it".to_owned()),
            StoreError::NotUtf8 { path } => (path, "has a name that is not UTF-8".to_owned()),
            StoreError::Changing { path } => (path, "changed while it was read".to_owned()),
            StoreError::Io { path, source, .. } => (path, unreadable(path, source)?),
            _ => return None,
        };
        let help = match error {
            StoreError::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => Some("take the right to read it: `chmod u+rX`".to_owned()),
                io::ErrorKind::NotFound if !path.is_symlink() => None,
                _ => Some("remove the link, or put a plain file in its place".to_owned()),
            },
            StoreError::Special { .. } => Some("put a plain file or folder in its place".to_owned()),
            error => error.help(),
        };
        path.starts_with(root).then(|| Self { path: path.clone(), what, help })
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Option<String> {
    match error.kind() {
        io::ErrorKind::NotFound if path.is_symlink() => Some("is a link that leads nowhere".to_owned()),
        io::ErrorKind::NotFound => Some("is gone".to_owned()),
        io::ErrorKind::PermissionDenied => Some("may not be read".to_owned()),
        _ if error.raw_os_error() == Some(libc::ELOOP) => Some("is a link that leads to itself".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_elsewhere_is_the_stores_own() {
        let error = StoreError::Special { path: "/a/b/c".into(), what: "a pipe" };
        let odd = Odd::below(Path::new("/a/b"), &error).unwrap();
        assert_eq!((odd.path.as_path(), odd.what.as_str()), (Path::new("/a/b/c"), "is a pipe"));
        assert_eq!(Odd::below(Path::new("/a/bb"), &error), None);
        assert_eq!(Odd::below(Path::new("/a"), &StoreError::Absent { root: "/a".into() }), None);
    }
}
