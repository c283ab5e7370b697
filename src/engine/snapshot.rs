//! The shortcut of a run that has nothing to do.
//!
//! After a complete run, everything that made it complete is written down with its stat signature: pipeline files,
//! input files, blobs, records, and what lies under `out/`. While all of that is untouched, the next run of the same
//! request ends after some thousand `stat` calls, without reading a record. A snapshot is a memory, like everything
//! under `index/`: a missing, old or doubtful one only means that the run is decided stage by stage.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Raised whenever a snapshot's fields or their meaning change.
const VERSION: u32 = 1;

/// A file changed this shortly before its signature was taken might change again without a trace, where the file
/// system's clock is coarse.
const DOUBTFUL: Duration = Duration::from_millis(50);

/// What `stat` says of a file that was not touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Signature {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Signature {
    fn of(path: &Path) -> io::Result<Self> {
        let m = fs::metadata(path)?;
        Ok(Self {
            device: m.dev(),
            inode: m.ino(),
            size: m.len(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        })
    }
}

/// What a complete run left behind.
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot {
    version: u32,
    /// Everything about the program and the request that a decision depends on, besides files and variables.
    circumstances: [u8; 32],
    /// Declared environment variables, and their values then.
    env: Vec<(String, Option<String>)>,
    files: Vec<(PathBuf, Signature)>,
    /// Folders that users own, with the digest of their content: they are looked through each time.
    pub folders: Vec<(PathBuf, [u8; 32])>,
    pub stages: usize,
    /// `metrics` results, to be shown again: variant, stage, file.
    pub metrics: Vec<(String, String, PathBuf)>,
}

impl Snapshot {
    /// Takes the signatures of `untouched` (files that only `grlm` writes) and of `users_files`.
    ///
    /// # Errors
    /// A file is gone. `None` if a user's file was changed so recently that its signature proves nothing.
    pub fn take(
        circumstances: [u8; 32],
        env: Vec<(String, Option<String>)>,
        untouched: &[PathBuf],
        users_files: &[PathBuf],
    ) -> io::Result<Option<Self>> {
        let doubtful_since = SystemTime::now().checked_sub(DOUBTFUL).unwrap_or(SystemTime::UNIX_EPOCH);
        for path in users_files {
            if fs::metadata(path)?.modified()? >= doubtful_since {
                return Ok(None);
            }
        }
        let files = untouched
            .par_iter()
            .chain(users_files)
            .map(|path| Ok((path.clone(), Signature::of(path)?)))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Some(Self {
            version: VERSION,
            circumstances,
            env,
            files,
            folders: Vec::new(),
            stages: 0,
            metrics: Vec::new(),
        }))
    }

    /// The snapshot kept in `file`, if it was taken in the same circumstances, no variable changed and no file was
    /// touched since. Folders are left for the caller to compare.
    pub fn untouched(file: &Path, circumstances: [u8; 32]) -> Option<Self> {
        let snapshot: Self = postcard::from_bytes(&fs::read(file).ok()?).ok()?;
        let same = snapshot.version == VERSION
            && snapshot.circumstances == circumstances
            && snapshot.env.iter().all(|(name, value)| std::env::var(name).ok() == *value)
            && snapshot.files.par_iter().all(|(path, signature)| Signature::of(path).is_ok_and(|s| s == *signature));
        same.then_some(snapshot)
    }

    /// Writes the snapshot, whole or not at all.
    ///
    /// # Errors
    /// No space, no permission.
    pub fn write(&self, file: &Path) -> io::Result<()> {
        let folder = file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        let bytes = postcard::to_stdvec(self).map_err(io::Error::other)?;
        let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
        io::Write::write_all(&mut temporary, &bytes)?;
        temporary.persist(file)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn old(path: &Path, text: &str) {
        fs::write(path, text).unwrap();
        let hour_ago = SystemTime::now() - Duration::from_secs(3600);
        fs::File::options().write(true).open(path).unwrap().set_modified(hour_ago).unwrap();
    }

    #[test]
    fn any_touched_file_or_other_circumstance_voids_it() {
        let dir = tempfile::tempdir().unwrap();
        let (blob, input, kept) = (dir.path().join("blob"), dir.path().join("input"), dir.path().join("snapshot"));
        old(&blob, "blob");
        old(&input, "input");
        let take = || Snapshot::take([1; 32], vec![], &[blob.clone()], &[input.clone()]).unwrap();
        take().unwrap().write(&kept).unwrap();
        assert!(Snapshot::untouched(&kept, [1; 32]).is_some());
        assert!(Snapshot::untouched(&kept, [2; 32]).is_none());
        old(&input, "inpus");
        assert!(Snapshot::untouched(&kept, [1; 32]).is_none(), "same size and time, but its ctime is another");
        take().unwrap().write(&kept).unwrap();
        fs::remove_file(&blob).unwrap();
        assert!(Snapshot::untouched(&kept, [1; 32]).is_none());
    }

    #[test]
    fn a_file_changed_just_now_proves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("input");
        fs::write(&input, "fresh").unwrap();
        assert!(Snapshot::take([1; 32], vec![], &[], &[input]).unwrap().is_none());
    }

    #[test]
    fn garbage_is_no_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("snapshot");
        fs::write(&kept, [0xff; 100]).unwrap();
        assert!(Snapshot::untouched(&kept, [1; 32]).is_none());
    }
}
