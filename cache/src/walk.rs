//! Listing a folder with the stat signature of every file, in parallel. Digests and contents are not looked at.
//!
//! Symbolic links are followed, inside the folder and out of it: what counts is what a program that reads the folder
//! would see (hub caches are folders of links). A link to a folder that holds it, a dangling link and anything that
//! is neither file nor folder are errors. Empty folders count: some programs need them to be there.

use std::os::fd::OwnedFd;
use std::path::Path;

use rayon::prelude::*;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};

use crate::signature::Signature;
use crate::{Result, StoreError};

/// One thing in a folder; `path` is relative to it, with `/` between names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Walked {
    pub path: String,
    pub kind: WalkedKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WalkedKind {
    /// `linked`: it is, or lies behind, a symbolic link, so it is not this folder's own.
    File {
        signature: Signature,
        linked: bool,
    },
    EmptyFolder,
}

/// Everything in the folder `root`, sorted by path bytes. Each file is read as a whole path, `root/path`, by callers.
pub(crate) fn walk(root: &Path) -> Result<Vec<Walked>> {
    let folder = open_folder(rustix::fs::CWD, root, root)?;
    let place = Place { path: String::new(), ancestors: Vec::new(), linked: false };
    let mut found = walk_folder(root, folder, &place)?;
    found.par_sort_unstable_by(|a, b| a.path.as_bytes().cmp(b.path.as_bytes()));
    Ok(found)
}

struct Place {
    /// Relative to the root; empty for the root itself.
    path: String,
    /// Device and inode of the folders above, to find loops.
    ancestors: Vec<(u64, u64)>,
    linked: bool,
}

fn open_folder(at: impl std::os::fd::AsFd, name: &Path, shown: &Path) -> Result<OwnedFd> {
    rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(StoreError::while_doing("open folder", shown))
}

fn walk_folder(root: &Path, folder: OwnedFd, place: &Place) -> Result<Vec<Walked>> {
    let shown = || root.join(&place.path);
    let stat = rustix::fs::fstat(&folder).map_err(StoreError::while_doing("look at", &shown()))?;
    let here = Signature::of_stat(&stat);
    let identity = (here.device, here.inode);
    if place.ancestors.contains(&identity) {
        return Err(StoreError::LinkLoop { path: shown() });
    }
    let entries = read_names(root, &folder, place)?;
    if entries.is_empty() && !place.path.is_empty() {
        return Ok(vec![Walked { path: place.path.clone(), kind: WalkedKind::EmptyFolder }]);
    }
    let ancestors: Vec<_> = place.ancestors.iter().copied().chain([identity]).collect();
    let look = |(name, known): &(String, FileType)| -> Result<Vec<Walked>> {
        let path = if place.path.is_empty() { name.clone() } else { format!("{}/{name}", place.path) };
        let shown = || root.join(&path);
        let mut linked = place.linked;
        let mut kind = *known;
        let mut stat = None;
        if !kind.is_dir() {
            // An entry of known kind takes one call, a link takes the one that follows it.
            let found = rustix::fs::statat(&folder, name.as_str(), AtFlags::empty())
                .map_err(StoreError::while_doing("look at", &shown()))?;
            linked |= kind.is_symlink();
            if kind == FileType::Unknown {
                let own = rustix::fs::statat(&folder, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(StoreError::while_doing("look at", &shown()))?;
                linked |= FileType::from_raw_mode(own.st_mode).is_symlink();
            }
            kind = FileType::from_raw_mode(found.st_mode);
            stat = Some(found);
        }
        match (kind, stat) {
            (FileType::RegularFile, Some(stat)) => {
                Ok(vec![Walked { kind: WalkedKind::File { signature: Signature::of_stat(&stat), linked }, path }])
            }
            (FileType::Directory, _) => {
                let inner = open_folder(&folder, Path::new(name), &shown())?;
                walk_folder(root, inner, &Place { path, ancestors: ancestors.clone(), linked })
            }
            _ => Err(StoreError::Special { path: shown(), what: name_of(kind) }),
        }
    };
    // Most entries are files that give one element each: a chunk amortises what a parallel task costs.
    let parts: Vec<Vec<Walked>> = entries
        .par_chunks(64)
        .map(|chunk| {
            let mut found = Vec::with_capacity(chunk.len());
            for entry in chunk {
                found.append(&mut look(entry)?);
            }
            Ok(found)
        })
        .collect::<Result<_>>()?;
    Ok(parts.into_iter().flatten().collect())
}

fn read_names(root: &Path, folder: &OwnedFd, place: &Place) -> Result<Vec<(String, FileType)>> {
    let shown = || root.join(&place.path);
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(folder).map_err(StoreError::while_doing("list", &shown()))? {
        let entry = entry.map_err(StoreError::while_doing("list", &shown()))?;
        match entry.file_name().to_str() {
            Ok("." | "..") => {}
            Ok(name) => names.push((name.to_owned(), entry.file_type())),
            Err(_) => {
                return Err(StoreError::NotUtf8 { path: shown().join(entry.file_name().to_string_lossy().as_ref()) });
            }
        }
    }
    Ok(names)
}

/// How an error names a thing that cannot be stored.
pub(crate) fn name_of(kind: FileType) -> &'static str {
    match kind {
        FileType::Fifo => "a named pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Symlink => "a symbolic link",
        _ => "a special file",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(found: &[Walked]) -> Vec<&str> {
        found.iter().map(|walked| walked.path.as_str()).collect()
    }

    #[test]
    fn files_links_and_empty_folders_are_found_in_byte_order() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("b/deep")).unwrap();
        fs::create_dir_all(root.join("empty")).unwrap();
        fs::write(root.join("b/deep/z"), "1").unwrap();
        fs::write(root.join("b.txt"), "2").unwrap();
        fs::write(dir.path().join("outside"), "3").unwrap();
        symlink("../outside", root.join("a")).unwrap();
        symlink("b", root.join("c")).unwrap();
        let found = walk(&root).unwrap();
        assert_eq!(names(&found), ["a", "b.txt", "b/deep/z", "c/deep/z", "empty"]);
        let linked: Vec<bool> =
            found.iter().map(|walked| matches!(walked.kind, WalkedKind::File { linked: true, .. })).collect();
        assert_eq!(linked, [true, false, false, true, false]);
        assert_eq!(found[4].kind, WalkedKind::EmptyFolder);
    }

    #[test]
    fn loops_dangling_links_and_special_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        symlink("..", dir.path().join("a/up")).unwrap();
        assert!(matches!(walk(dir.path()), Err(StoreError::LinkLoop { .. })));
        fs::remove_file(dir.path().join("a/up")).unwrap();
        symlink("nowhere", dir.path().join("a/dangling")).unwrap();
        assert!(matches!(walk(dir.path()), Err(StoreError::Io { .. })));
        fs::remove_file(dir.path().join("a/dangling")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        assert!(matches!(walk(dir.path()), Err(StoreError::Special { what: "a socket", .. })));
    }
}
