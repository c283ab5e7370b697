//! Who computes which row at this moment: one byte of a file locked for each row, at a place that its key gives.
//!
//! The locks belong to an open file, so the kernel frees them when their process dies, and they hold across hosts
//! where the disk has locks. Two rows may meet at one place in a long time; then one of them waits for the other.
//! Claims are advice: where there are no such locks everything is granted.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::digest::Digest;
use crate::{Result, StoreError};

const FILE: &str = "claims";

#[derive(Debug)]
pub(crate) struct Claims {
    folder: PathBuf,
    file: File,
}

/// Bytes to lock.
#[derive(Clone, Copy)]
struct Span {
    start: libc::off_t,
    /// 0 reaches to the end of all files.
    length: libc::off_t,
}

impl Span {
    const ALL: Span = Span { start: 0, length: 0 };

    fn of(key: &Digest) -> Span {
        let place = key.as_bytes().last_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        // Offsets are signed, and the byte behind the last one must have a number too.
        Span { start: (place >> 2) as libc::off_t, length: 1 }
    }
}

impl Claims {
    /// Opens the namespace's file of claims, and makes it if it is missing.
    pub fn open(folder: &Path) -> Result<Claims> {
        let path = folder.join(FILE);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => fs::create_dir_all(folder).and_then(|()| options.open(&path)),
            _ => Err(error),
        });
        Ok(Claims { folder: folder.to_owned(), file: file.map_err(StoreError::while_doing("open", &path))? })
    }

    /// Claims rows; `false` for those that somebody else has. One's own rows are granted again.
    pub fn claim(&mut self, keys: &[Digest]) -> Result<Vec<bool>> {
        loop {
            let granted = keys.iter().map(|key| self.is_granted(Span::of(key))).collect();
            // The file may have gone before it was locked, with the namespace: others lock the next one.
            if self.file.metadata().is_ok_and(|file| file.nlink() == 0) {
                *self = Claims::open(&self.folder)?;
                continue;
            }
            return Ok(granted);
        }
    }

    /// Removes the file, unless somebody has claimed a row; whether it is gone.
    pub fn remove(self) -> bool {
        self.is_granted(Span::ALL) && fs::remove_file(self.folder.join(FILE)).is_ok()
    }

    pub fn release(&self, key: &Digest) {
        // What cannot be freed now is freed with the process.
        let _ = self.lock(Span::of(key), libc::F_UNLCK);
    }

    fn is_granted(&self, span: Span) -> bool {
        match self.lock(span, libc::F_WRLCK) {
            Ok(()) => true,
            Err(error) => !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)),
        }
    }

    fn lock(&self, span: Span, kind: libc::c_int) -> io::Result<()> {
        // SAFETY: a zeroed `flock` is a valid value.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        (lock.l_start, lock.l_len) = (span.start, span.length);
        loop {
            // SAFETY: the descriptor is open, and `lock` is a valid `flock` for the length of the call.
            if unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_one_owner_until_it_is_released_or_its_owner_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Claims::open(&dir.path().join("ns")).unwrap();
        let keys: Vec<Digest> = (0..50u8).map(|n| Digest::of(&[n])).collect();
        let (mut one, mut two) = (open(), open());
        assert_eq!(one.claim(&keys).unwrap(), [true; 50]);
        assert_eq!(one.claim(&keys).unwrap(), [true; 50], "again");
        assert_eq!(two.claim(&keys).unwrap(), [false; 50]);
        one.release(&keys[7]);
        assert_eq!(two.claim(&keys[7..8]).unwrap(), [true]);
        assert_eq!(one.claim(&keys[7..8]).unwrap(), [false]);
        drop(one);
        assert_eq!(two.claim(&keys).unwrap(), [true; 50]);
    }

    #[test]
    fn the_file_stays_while_a_row_is_claimed_and_claims_move_to_the_next_file() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Claims::open(dir.path()).unwrap();
        let key = [Digest::of(b"row")];
        let mut early = open();
        let mut owner = open();
        assert_eq!(owner.claim(&key).unwrap(), [true]);
        assert!(!open().remove());
        owner.release(&key[0]);
        assert!(open().remove() && !dir.path().join(FILE).exists());
        assert_eq!(early.claim(&key).unwrap(), [true]);
        assert_eq!(open().claim(&key).unwrap(), [false], "both lock the file that is there");
    }
}
