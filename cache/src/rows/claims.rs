//! Who computes which row at this moment: one byte of a file locked for each row, at a place that its key gives.
//!
//! The locks belong to an open file, so the kernel frees them when their process dies, and they hold across hosts
//! where the disk has locks. Two rows may meet at one place in a long time; then one of them waits for the other.
//! Claims are advice: where there are no such locks everything is granted.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::digest::Digest;
use crate::{Result, StoreError};

#[derive(Debug)]
pub(crate) struct Claims {
    file: File,
}

impl Claims {
    /// Opens the namespace's file of claims, and makes it if it is missing.
    pub fn open(folder: &Path) -> Result<Claims> {
        let path = folder.join("claims");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => fs::create_dir_all(folder).and_then(|()| options.open(&path)),
            _ => Err(error),
        });
        Ok(Claims { file: file.map_err(StoreError::while_doing("open", &path))? })
    }

    /// Claims a row; `false` if somebody else has it. One's own row is granted again.
    pub fn claim(&self, key: &Digest) -> bool {
        match self.lock(key, libc::F_WRLCK) {
            Ok(()) => true,
            Err(error) => !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)),
        }
    }

    pub fn release(&self, key: &Digest) {
        // What cannot be freed now is freed with the process.
        let _ = self.lock(key, libc::F_UNLCK);
    }

    fn lock(&self, key: &Digest, kind: libc::c_int) -> io::Result<()> {
        // SAFETY: a zeroed `flock` is a valid value.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        let place = key.as_bytes().last_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        // Offsets are signed, and the byte behind the last one must have a number too.
        lock.l_start = (place >> 2) as libc::off_t;
        lock.l_len = 1;
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
        let (one, two) = (open(), open());
        assert!(keys.iter().all(|key| one.claim(key)));
        assert!(keys.iter().all(|key| one.claim(key)), "again");
        assert!(!keys.iter().any(|key| two.claim(key)));
        one.release(&keys[7]);
        assert!(two.claim(&keys[7]) && !one.claim(&keys[7]));
        drop(one);
        assert!(keys.iter().all(|key| two.claim(key)));
    }
}
