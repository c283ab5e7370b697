//! One lock per action, so that a second process waits and then finds the result instead of computing it twice.
//!
//! It is an advisory `flock` on `locks/<key>`. The kernel frees it when its holder dies, however it dies, so there are
//! no stale locks; NFS has it too, across hosts. The file also says who holds it, for messages. The holder removes the
//! file before it lets go, and whoever gets a lock on a file that is no longer the one at the path tries again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::digest::ActionKey;
use crate::signature::now;
use crate::store::{Store, host_name};
use crate::{Result, StoreError};

/// Held until dropped, or until the process ends.
#[derive(Debug)]
pub struct ActionLock {
    path: PathBuf,
    _file: File,
}

/// Who has a lock, as far as they said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub host: String,
    pub pid: u32,
    /// Milliseconds since 1970.
    pub since_ms: u64,
}

impl Store {
    /// Waits for the lock. To show who is waited for, or to be able to give up, poll [`Store::try_lock_action`].
    pub fn lock_action(&self, key: &ActionKey) -> Result<ActionLock> {
        loop {
            if let Some(lock) = self.lock(key, FlockOperation::LockExclusive)? {
                return Ok(lock);
            }
        }
    }

    /// The lock, or `None` while another has it.
    pub fn try_lock_action(&self, key: &ActionKey) -> Result<Option<ActionLock>> {
        self.lock(key, FlockOperation::NonBlockingLockExclusive)
    }

    /// Who has the lock at this moment; `None` if nobody, or if they have not said yet.
    pub fn lock_holder(&self, key: &ActionKey) -> Option<Holder> {
        serde_json::from_slice(&fs::read(self.lock_path(key)).ok()?).ok()
    }

    fn lock_path(&self, key: &ActionKey) -> PathBuf {
        self.root.join("locks").join(key.0.hex())
    }

    /// `None` if it is taken, or (when told to wait) if the file was replaced while waiting.
    fn lock(&self, key: &ActionKey, operation: FlockOperation) -> Result<Option<ActionLock>> {
        self.require_write()?;
        let path = self.lock_path(key);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).or_else(|error| match (error.kind(), path.parent()) {
            (io::ErrorKind::NotFound, Some(folder)) => fs::create_dir_all(folder).and_then(|()| options.open(&path)),
            _ => Err(error),
        });
        let mut file = file.map_err(StoreError::while_doing("open the lock", &path))?;
        loop {
            match rustix::fs::flock(&file, operation) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(StoreError::io("lock", &path, error.into())),
            }
        }
        let locked = file.metadata().map_err(StoreError::while_doing("look at", &path))?;
        let is_current =
            fs::metadata(&path).is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino()));
        if !is_current {
            return match operation {
                FlockOperation::NonBlockingLockExclusive => self.lock(key, operation),
                _ => Ok(None),
            };
        }
        let since_ms = u64::try_from(now() / 1_000_000).unwrap_or(0);
        let holder = Holder { host: host_name(), pid: std::process::id(), since_ms };
        // Only for messages: a lock without it is as good.
        if let Ok(text) = serde_json::to_vec(&holder) {
            let _ = file.set_len(0).and_then(|()| file.write_all(&text));
        }
        Ok(Some(ActionLock { path, _file: file }))
    }
}

impl Drop for ActionLock {
    fn drop(&mut self) {
        // A file that stays behind is locked anew by the next one who needs it.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::testing::{key, store};

    #[test]
    fn one_at_a_time_and_other_actions_are_free() {
        let (_dir, store) = store();
        let lock = store.try_lock_action(&key(1)).unwrap().unwrap();
        assert!(store.try_lock_action(&key(1)).unwrap().is_none());
        assert_eq!(store.lock_holder(&key(1)).unwrap().pid, std::process::id());
        let other = store.try_lock_action(&key(2)).unwrap();
        assert!(other.is_some());
        drop(lock);
        assert_eq!(store.lock_holder(&key(1)), None);
        assert!(store.try_lock_action(&key(1)).unwrap().is_some());
    }

    #[test]
    fn a_file_left_by_a_dead_holder_is_no_obstacle() {
        let (_dir, store) = store();
        let path = store.lock_path(&key(1));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, r#"{"host":"gone","pid":1,"since_ms":0}"#).unwrap();
        let lock = store.lock_action(&key(1)).unwrap();
        assert_eq!(store.lock_holder(&key(1)).unwrap().pid, std::process::id());
        drop(lock);
        assert!(!path.exists());
    }

    #[test]
    fn waiting_threads_never_overlap() {
        let (_dir, store) = store();
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let lock = store.lock_action(&key(1)).unwrap();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
    }
}
