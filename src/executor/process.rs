//! The few system calls that the standard library has no safe form of: signal handlers and `wait4`.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};

/// A handler may only do what is async-signal-safe: atomics and plain system calls.
pub type Handler = extern "C" fn(libc::c_int);

/// Runs `handler` when `signal` arrives; interrupted system calls are restarted.
///
/// # Errors
/// If the system refuses (an invalid signal number).
pub fn on_signal(signal: libc::c_int, handler: Handler) -> io::Result<()> {
    // SAFETY: a zeroed `sigaction` is valid; the handler has the right type and is required to be async-signal-safe.
    let result = unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = handler as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(signal, &action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Moves the standard input to a descriptor that children do not inherit, and puts `/dev/null` in its place.
///
/// # Errors
/// If descriptors run out, or `/dev/null` cannot be opened.
pub fn take_stdin() -> io::Result<OwnedFd> {
    let null = std::fs::File::open("/dev/null")?;
    take(libc::STDIN_FILENO, null.as_fd())
}

/// Moves the standard output likewise, and lets what is written to it go where the standard error goes.
///
/// # Errors
/// If descriptors run out, or there is no standard output.
pub fn take_stdout() -> io::Result<OwnedFd> {
    let stderr = io::stderr();
    take(libc::STDOUT_FILENO, stderr.as_fd())
}

fn take(stream: RawFd, instead: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: `fcntl` returns a new descriptor that nobody else owns.
    let taken = unsafe {
        match libc::fcntl(stream, libc::F_DUPFD_CLOEXEC, 3) {
            -1 => return Err(io::Error::last_os_error()),
            descriptor => OwnedFd::from_raw_fd(descriptor),
        }
    };
    // SAFETY: both descriptors are open.
    if unsafe { libc::dup2(instead.as_raw_fd(), stream) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(taken)
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

/// What a process, and the descendants it waited for, used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// The largest resident set of one of the processes, in bytes.
    pub peak_memory: u64,
    /// User and system time of all of them.
    pub cpu_time: Duration,
}

/// Waits for a child and takes its resource usage.
///
/// # Errors
/// If `pid` is not a child of this process, or was waited for already.
pub fn wait_with_usage(pid: Pid) -> io::Result<(Exit, Usage)> {
    let mut status: libc::c_int = 0;
    // SAFETY: both pointers are valid for writes; a zeroed `rusage` is a valid value.
    let usage = unsafe {
        let mut usage: libc::rusage = mem::zeroed();
        while libc::wait4(pid.as_raw_nonzero().get(), &mut status, 0, &mut usage) == -1 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        usage
    };
    let exit = if libc::WIFSIGNALED(status) {
        Exit::Signal(libc::WTERMSIG(status))
    } else {
        Exit::Code(libc::WEXITSTATUS(status))
    };
    Ok((exit, Usage::from_raw(&usage)))
}

/// What this process's ended and waited-for children used.
pub fn children_usage() -> Usage {
    // SAFETY: the pointer is valid for writes; a zeroed `rusage` is a valid value.
    let usage = unsafe {
        let mut usage: libc::rusage = mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    Usage::from_raw(&usage)
}

impl Usage {
    fn from_raw(raw: &libc::rusage) -> Self {
        let time = |t: libc::timeval| {
            Duration::from_secs(u64::try_from(t.tv_sec).unwrap_or(0))
                + Duration::from_micros(u64::try_from(t.tv_usec).unwrap_or(0))
        };
        Self {
            peak_memory: u64::try_from(raw.ru_maxrss).unwrap_or(0).saturating_mul(1024),
            cpu_time: time(raw.ru_utime) + time(raw.ru_stime),
        }
    }
}

/// The largest resident set of this process so far, in bytes. Unlike `getrusage`, it does not count what the
/// process that spawned this one had.
pub fn own_peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// What uses a GPU can take seconds to be gone; what takes longer than this is in uninterruptible sleep, and not worth
/// more waiting.
const CHILDREN_GONE: Duration = Duration::from_secs(10);

/// Ends whatever became a child of this process and is still running (a subreaper adopts what daemonised itself), and
/// waits until it is gone.
pub fn kill_children() {
    let start = Instant::now();
    // A child's own children come to us once it is gone, hence the rounds.
    while start.elapsed() < CHILDREN_GONE {
        match rustix::process::wait(rustix::process::WaitOptions::NOHANG) {
            Err(rustix::io::Errno::INTR) | Ok(Some(_)) => continue,
            Err(_) => return,
            Ok(None) => {}
        }
        for pid in children() {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        let at_first = start.elapsed() < Duration::from_millis(20);
        std::thread::sleep(Duration::from_millis(if at_first { 1 } else { 20 }));
    }
}

fn children() -> Vec<Pid> {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>())
        .filter_map(Pid::from_raw)
        .collect()
}

/// How many processes the kernel has ended for want of memory since it started; `None` where it does not say.
pub fn kernel_oom_kills() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
}
