//! Settings of the C allocator.

/// Keeps freed memory inside the process.
///
/// Tensors of megabytes come and go at every step; by default glibc maps and unmaps each of them, and the page
/// faults cost more than the arithmetic (2.5 times, measured).
pub fn tune() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only sets parameters of the allocator; called before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        // The heap grows in steps of this size instead of 128 KiB; pages that nobody touched take no memory.
        libc::mallopt(libc::M_TOP_PAD, 8 << 20);
    }
}
