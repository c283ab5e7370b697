//! One lock per action, so that a second process waits and then finds the result instead of computing it twice. Results
//! do not depend on it: two processes that compute the same action publish the same record.
//!
//! * **The kernel's lock**, an advisory `flock` on `locks/<key>`. It is freed when its holder dies, however it dies,
//!   and NFS has it too, across hosts. The file also says who holds it. The holder removes the file before it lets go,
//!   and whoever gets a lock on a file that is no longer the one at the path tries again.
//! * **A claim**, where the disk has no such locks (NFS mounted without them): a file `locks/<key>.claim` that is
//!   written aside and linked into place, which is atomic on NFS as well. It says host, boot, process and start of the
//!   process, and its holder dates it anew every few seconds. It is stale when that process is gone (the same host), or
//!   when it was not dated for [`SILENCE`] by the disk's own clock (another host); then it is moved aside and taken.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::{FlockOperation, Timespec, Timestamps};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::digest::ActionKey;
use crate::process::ProcessId;
use crate::signature::now;
use crate::store::{Store, temporary_in};
use crate::{Result, StoreError};

/// A claim of another host that was not renewed for this long is stale.
pub const SILENCE: Duration = Duration::from_secs(60);
/// How often a claim is renewed.
const RENEW: Duration = Duration::from_secs(10);
/// Between two looks at a claim that somebody else has.
const LOOK: Duration = Duration::from_millis(50);

/// Held until dropped, or until the process ends.
#[derive(Debug)]
pub struct ActionLock {
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Kernel { _file: File },
    Claim { inode: u64, stop: Option<mpsc::Sender<()>>, renewer: Option<JoinHandle<()>> },
}

/// Who has a lock, as far as they said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    #[serde(flatten)]
    pub process: ProcessId,
    /// Milliseconds since 1970.
    pub since_ms: u64,
}

impl Holder {
    fn own() -> Holder {
        Holder { process: ProcessId::own(), since_ms: u64::try_from(now() / 1_000_000).unwrap_or(0) }
    }
}

impl Store {
    /// Waits for the lock. To show who is waited for, or to be able to give up, poll [`Store::try_lock_action`].
    pub fn lock_action(&self, key: &ActionKey) -> Result<ActionLock> {
        loop {
            if !self.no_flock.load(Ordering::Relaxed)
                && let Some(lock) = self.lock(&self.lock_path(key), FlockOperation::LockExclusive)?
            {
                return Ok(lock);
            }
            if let Some(lock) = self.try_lock_action(key)? {
                return Ok(lock);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// The lock, or `None` while another has it.
    pub fn try_lock_action(&self, key: &ActionKey) -> Result<Option<ActionLock>> {
        self.try_lock_path(&self.lock_path(key))
    }

    /// Who has the lock at this moment; `None` if nobody, or if they have not said yet.
    pub fn lock_holder(&self, key: &ActionKey) -> Option<Holder> {
        let path = self.lock_path(key);
        let read = |path: &Path| serde_json::from_slice(&fs::read(path).ok()?).ok();
        read(&claim_path(&path)).or_else(|| read(&path))
    }

    /// Who works on an action now.
    pub fn lock_holders(&self) -> Vec<Holder> {
        let held = crate::record::list(&self.root.join("locks")).unwrap_or_default();
        let named = held.into_iter().filter_map(|entry| entry.file_name().to_str()?.split('.').next()?.parse().ok());
        named.filter_map(|key: ActionKey| self.lock_holder(&key)).collect()
    }

    /// Removes lock files that nobody holds: they cost nothing but the look of them. Returns how many.
    pub fn sweep_locks(&self) -> Result<u64> {
        let mut removed = 0;
        for entry in crate::record::list(&self.root.join("locks"))? {
            let path = entry.path();
            let path = if path.extension().is_some_and(|e| e == "claim") { path.with_extension("") } else { path };
            if !is_hidden(&path) && self.try_lock_path(&path)?.is_some() {
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn lock_path(&self, key: &ActionKey) -> PathBuf {
        self.root.join("locks").join(key.0.hex())
    }

    pub(crate) fn try_lock_path(&self, path: &Path) -> Result<Option<ActionLock>> {
        if !self.no_flock.load(Ordering::Relaxed)
            && let Some(lock) = self.lock(path, FlockOperation::NonBlockingLockExclusive)?
        {
            return Ok(Some(lock));
        }
        if self.no_flock.load(Ordering::Relaxed) { self.claim(path) } else { Ok(None) }
    }

    /// The kernel's lock. `None` if it is taken, if (when told to wait) the file was replaced while waiting, or if the
    /// disk has no such locks, which is remembered.
    fn lock(&self, path: &Path, operation: FlockOperation) -> Result<Option<ActionLock>> {
        self.require_write()?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(path).or_else(|error| match (error.kind(), path.parent()) {
            (io::ErrorKind::NotFound, Some(folder)) => fs::create_dir_all(folder).and_then(|()| options.open(path)),
            _ => Err(error),
        });
        let mut file = file.map_err(StoreError::while_doing("open the lock", path))?;
        loop {
            match rustix::fs::flock(&file, operation) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(Errno::NOLCK | Errno::NOTSUP | Errno::NOSYS) => {
                    self.no_flock.store(true, Ordering::Relaxed);
                    let _ = fs::remove_file(path);
                    return Ok(None);
                }
                Err(error) => return Err(StoreError::io("lock", path, error.into())),
            }
        }
        let locked = file.metadata().map_err(StoreError::while_doing("look at", path))?;
        let is_current =
            fs::metadata(path).is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino()));
        if !is_current {
            return match operation {
                FlockOperation::NonBlockingLockExclusive => self.lock(path, operation),
                _ => Ok(None),
            };
        }
        // Only for messages: a lock without it is as good.
        if let Ok(text) = serde_json::to_vec(&Holder::own()) {
            let _ = file.set_len(0).and_then(|()| file.write_all(&text));
        }
        Ok(Some(ActionLock { path: path.to_owned(), kind: Kind::Kernel { _file: file } }))
    }

    /// A claim, or `None` while another's is good.
    fn claim(&self, path: &Path) -> Result<Option<ActionLock>> {
        self.require_write()?;
        let path = claim_path(path);
        let folder = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(folder).map_err(StoreError::while_doing("create the folder", folder))?;
        let refused = || StoreError::while_doing("claim the lock", &path);
        let mut staged = temporary_in(folder).map_err(refused())?;
        let text = serde_json::to_vec(&Holder::own()).map_err(|error| refused()(io::Error::other(error)))?;
        staged.write_all(&text).map_err(refused())?;
        for _ in 0..2 {
            let linked = fs::hard_link(staged.path(), &path);
            // A reply that got lost makes NFS repeat the call, and the repetition fails: the count of names tells.
            let mine = staged.as_file().metadata().map_err(refused())?;
            if linked.is_ok() || mine.nlink() == 2 {
                let inode = mine.ino();
                let (stop, stopped) = mpsc::channel();
                let claimed = path.clone();
                let renewer = std::thread::spawn(move || {
                    while stopped.recv_timeout(RENEW) == Err(mpsc::RecvTimeoutError::Timeout) {
                        let _ = renew(&claimed, inode);
                    }
                });
                let kind = Kind::Claim { inode, stop: Some(stop), renewer: Some(renewer) };
                return Ok(Some(ActionLock { path, kind }));
            }
            let Ok(theirs) = fs::metadata(&path) else { continue };
            let silent = Duration::from_secs(u64::try_from(mine.mtime().saturating_sub(theirs.mtime())).unwrap_or(0));
            let holder: Option<Holder> = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
            let stale = match holder.and_then(|holder| holder.process.is_alive()) {
                Some(alive) => !alive,
                None => silent > SILENCE,
            };
            if !stale {
                return Ok(None);
            }
            // Whoever moves it has it; what was moved is looked at again, as another may have taken the lock meanwhile.
            let aside = folder.join(format!(".stale-{}-{}", std::process::id(), now()));
            if fs::rename(&path, &aside).is_ok() {
                if fs::metadata(&aside).is_ok_and(|moved| moved.ino() != theirs.ino()) {
                    let _ = fs::hard_link(&aside, &path);
                }
                let _ = fs::remove_file(&aside);
            }
        }
        Ok(None)
    }
}

fn claim_path(path: &Path) -> PathBuf {
    path.with_extension("claim")
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// Dates the claim by the disk's clock, if it is still ours.
fn renew(path: &Path, inode: u64) -> io::Result<()> {
    let file = File::open(path)?;
    if file.metadata()?.ino() == inode {
        let now = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
        rustix::fs::futimens(&file, &Timestamps { last_access: now, last_modification: now })?;
    }
    Ok(())
}

impl Drop for ActionLock {
    fn drop(&mut self) {
        match &mut self.kind {
            // A file that stays behind is locked anew by the next one who needs it.
            Kind::Kernel { .. } => drop(fs::remove_file(&self.path)),
            Kind::Claim { inode, stop, renewer } => {
                drop(stop.take());
                if let Some(renewer) = renewer.take() {
                    let _ = renewer.join();
                }
                if fs::metadata(&self.path).is_ok_and(|there| there.ino() == *inode) {
                    let _ = fs::remove_file(&self.path);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::testing::{key, store};

    /// Both kinds of locks must behave alike.
    fn each_kind(test: impl Fn(&Store)) {
        for no_flock in [false, true] {
            let (_dir, store) = store();
            store.no_flock.store(no_flock, Ordering::Relaxed);
            test(&store);
        }
    }

    #[test]
    fn one_at_a_time_and_other_actions_are_free() {
        each_kind(|store| {
            let lock = store.try_lock_action(&key(1)).unwrap().unwrap();
            assert!(store.try_lock_action(&key(1)).unwrap().is_none());
            assert_eq!(store.lock_holder(&key(1)).unwrap().process, ProcessId::own());
            let other = store.try_lock_action(&key(2)).unwrap();
            assert!(other.is_some());
            assert_eq!(store.sweep_locks().unwrap(), 0);
            drop((lock, other));
            assert_eq!(store.lock_holder(&key(1)), None);
            assert!(store.try_lock_action(&key(1)).unwrap().is_some());
            assert_eq!(fs::read_dir(store.root().join("locks")).unwrap().count(), 0, "nothing is left");
        });
    }

    #[test]
    fn a_file_left_by_a_dead_holder_is_no_obstacle() {
        each_kind(|store| {
            let path = store.lock_path(&key(1));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let dead = Holder { process: ProcessId { start: 1, ..ProcessId::own() }, since_ms: 0 };
            for path in [path.clone(), claim_path(&path)] {
                fs::write(path, serde_json::to_vec(&dead).unwrap()).unwrap();
            }
            let lock = store.lock_action(&key(1)).unwrap();
            drop(lock);
            store.sweep_locks().unwrap();
            let no_flock = store.no_flock.load(Ordering::Relaxed);
            assert!(!claim_path(&path).exists() || !no_flock);
            assert!(!path.exists() || no_flock);
        });
    }

    #[test]
    fn another_hosts_claim_counts_while_it_is_renewed() {
        let (_dir, store) = store();
        store.no_flock.store(true, Ordering::Relaxed);
        let path = claim_path(&store.lock_path(&key(1)));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let theirs = Holder { process: ProcessId { host: "elsewhere".into(), ..ProcessId::own() }, since_ms: 0 };
        fs::write(&path, serde_json::to_vec(&theirs).unwrap()).unwrap();
        assert!(store.try_lock_action(&key(1)).unwrap().is_none());
        assert_eq!(store.lock_holder(&key(1)).unwrap().process.host, "elsewhere");
        let date = |age| {
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(std::time::SystemTime::now() - age).unwrap();
        };
        date(SILENCE + Duration::from_secs(5));
        renew(&path, fs::metadata(&path).unwrap().ino()).unwrap();
        assert!(store.try_lock_action(&key(1)).unwrap().is_none(), "renewed");
        date(SILENCE + Duration::from_secs(5));
        let lock = store.try_lock_action(&key(1)).unwrap().unwrap();
        assert_eq!(store.lock_holder(&key(1)).unwrap().process, ProcessId::own());
        drop(lock);
        assert!(!path.exists());
    }

    #[test]
    fn waiting_threads_never_overlap() {
        each_kind(|store| {
            let inside = AtomicUsize::new(0);
            let rounds = if store.no_flock.load(Ordering::Relaxed) { 2 } else { 50 };
            std::thread::scope(|scope| {
                for _ in 0..8 {
                    scope.spawn(|| {
                        for _ in 0..rounds {
                            let lock = store.lock_action(&key(1)).unwrap();
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(lock);
                        }
                    });
                }
            });
        });
    }
}
