//! NVIDIA's management library, as far as it is needed: which GPUs there are, and how much memory processes hold on
//! them. Loaded when asked for; a machine without it has no NVIDIA driver.
//!
//! Names, values and layouts are those of `nvml.h` (API version 12). `GRLM_NVML` names another file to load.

use std::{
    collections::BTreeMap,
    env,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr,
};

use libloading::{Library, Symbol};

/// A GPU, or a MIG instance of one, as the driver knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The number that `nvidia-smi` shows; instances have their GPU's.
    pub index: usize,
    /// Of a MIG instance, its place on the GPU.
    pub instance: Option<usize>,
    /// `GPU-…` or `MIG-…`.
    pub uuid: String,
    /// In bytes.
    pub memory: u64,
}

/// Why NVML cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum NvmlError {
    /// There is no such library: no NVIDIA driver, or one whose library is elsewhere.
    #[error("the library of the NVIDIA driver cannot be loaded")]
    Absent { source: libloading::Error },
    #[error("the library of the NVIDIA driver lacks `{name}`")]
    Lacks { name: &'static str },
    #[error("{call} failed: {message}")]
    Failed { call: &'static str, code: c_int, message: String },
}

type Device = *mut c_void;

const SUCCESS: c_int = 0;
const NOT_SUPPORTED: c_int = 3;
const NOT_FOUND: c_int = 6;
const INSUFFICIENT_SIZE: c_int = 7;
const DRIVER_NOT_LOADED: c_int = 9;
const GPU_IS_LOST: c_int = 15;
const UUID_BYTES: usize = 96;

#[repr(C)]
#[derive(Default)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProcessInfo {
    pid: c_uint,
    used: u64,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

/// An open NVML; shut down when dropped.
pub struct Nvml {
    library: Library,
}

impl Nvml {
    /// # Errors
    /// [`NvmlError::Absent`] where there is no driver.
    pub fn open() -> Result<Self, NvmlError> {
        let name = env::var_os("GRLM_NVML").unwrap_or_else(|| "libnvidia-ml.so.1".into());
        // SAFETY: the library's initialisers are those of the installed driver, which has no requirements.
        let library = unsafe { Library::new(name) }.map_err(|source| NvmlError::Absent { source })?;
        let nvml = Self { library };
        // SAFETY: the signature is that of `nvml.h`.
        let init: Symbol<'_, unsafe extern "C" fn() -> c_int> = unsafe { nvml.symbol("nvmlInit_v2")? };
        // SAFETY: it may be called at any time, from any thread.
        nvml.check("nvmlInit_v2", unsafe { init() })?;
        Ok(nvml)
    }

    /// All GPUs in the driver's order; one that is split into MIG instances is shown as these. A GPU that was lost is
    /// left out.
    ///
    /// # Errors
    /// What NVML says.
    pub fn devices(&self) -> Result<Vec<Found>, NvmlError> {
        let mut found = Vec::new();
        for index in 0..self.count()? {
            let Some(device) = self.present(|out| self.handle("nvmlDeviceGetHandleByIndex_v2", index, out))? else {
                continue;
            };
            let instances = self.instances(device, index)?;
            if instances.is_empty() {
                found.extend(self.describe(device, index, None)?);
            }
            found.extend(instances);
        }
        Ok(found)
    }

    /// Bytes that each process holds on the GPU with this UUID. Empty where the driver does not tell.
    ///
    /// # Errors
    /// What NVML says; the GPU may be gone.
    pub fn memory_by_process(&self, uuid: &str) -> Result<BTreeMap<u32, u64>, NvmlError> {
        let mut name = uuid.as_bytes().to_vec();
        name.push(0);
        // SAFETY: the signatures are those of `nvml.h`.
        let by_uuid: Symbol<'_, unsafe extern "C" fn(*const c_char, *mut Device) -> c_int> =
            unsafe { self.symbol("nvmlDeviceGetHandleByUUID")? };
        let list: Symbol<'_, unsafe extern "C" fn(Device, *mut c_uint, *mut ProcessInfo) -> c_int> =
            unsafe { self.symbol("nvmlDeviceGetComputeRunningProcesses_v3")? };
        let mut device: Device = ptr::null_mut();
        // SAFETY: `name` ends with a zero byte, `device` is valid for writes.
        self.check("nvmlDeviceGetHandleByUUID", unsafe { by_uuid(name.as_ptr().cast(), &mut device) })?;
        let mut infos = vec![ProcessInfo::default(); 64];
        loop {
            let mut count = c_uint::try_from(infos.len()).unwrap_or(c_uint::MAX);
            // SAFETY: `infos` has room for `count` elements.
            let code = unsafe { list(device, &mut count, infos.as_mut_ptr()) };
            match code {
                INSUFFICIENT_SIZE => infos.resize(infos.len().max(count as usize) * 2, ProcessInfo::default()),
                NOT_SUPPORTED => return Ok(BTreeMap::new()),
                code => {
                    self.check("nvmlDeviceGetComputeRunningProcesses_v3", code)?;
                    infos.truncate(count as usize);
                    // Drivers that keep it to themselves say "all ones".
                    return Ok(infos.iter().filter(|i| i.used != u64::MAX).map(|i| (i.pid, i.used)).collect());
                }
            }
        }
    }

    fn count(&self) -> Result<c_uint, NvmlError> {
        // SAFETY: the signature is that of `nvml.h`.
        let get: Symbol<'_, unsafe extern "C" fn(*mut c_uint) -> c_int> =
            unsafe { self.symbol("nvmlDeviceGetCount_v2")? };
        let mut count = 0;
        // SAFETY: `count` is valid for writes.
        self.check("nvmlDeviceGetCount_v2", unsafe { get(&mut count) })?;
        Ok(count)
    }

    fn handle(&self, call: &'static str, index: c_uint, out: &mut Device) -> Result<(), NvmlError> {
        // SAFETY: the signature is that of `nvml.h`.
        let get: Symbol<'_, unsafe extern "C" fn(c_uint, *mut Device) -> c_int> = unsafe { self.symbol(call)? };
        // SAFETY: `out` is valid for writes.
        self.check(call, unsafe { get(index, out) })
    }

    /// The MIG instances of a GPU; none if it is not split, or cannot be.
    fn instances(&self, device: Device, index: c_uint) -> Result<Vec<Found>, NvmlError> {
        type Mode = unsafe extern "C" fn(Device, *mut c_uint, *mut c_uint) -> c_int;
        type Most = unsafe extern "C" fn(Device, *mut c_uint) -> c_int;
        type Instance = unsafe extern "C" fn(Device, c_uint, *mut Device) -> c_int;
        // SAFETY: the signatures are those of `nvml.h`; drivers before MIG lack the functions.
        let symbols = unsafe {
            (
                self.library.get::<Mode>(b"nvmlDeviceGetMigMode\0"),
                self.library.get::<Most>(b"nvmlDeviceGetMaxMigDeviceCount\0"),
                self.library.get::<Instance>(b"nvmlDeviceGetMigDeviceHandleByIndex\0"),
            )
        };
        let (Ok(mode), Ok(most), Ok(instance)) = symbols else { return Ok(Vec::new()) };
        let (mut current, mut pending, mut count) = (0, 0, 0);
        // SAFETY: all pointers are valid for writes.
        let split = unsafe { mode(device, &mut current, &mut pending) == SUCCESS && current == 1 };
        // SAFETY: as above.
        if !split || unsafe { most(device, &mut count) } != SUCCESS {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for place in 0..count {
            let call = "nvmlDeviceGetMigDeviceHandleByIndex";
            // SAFETY: as above.
            let handle = self.present(|out| self.check(call, unsafe { instance(device, place, out) }))?;
            if let Some(handle) = handle {
                found.extend(self.describe(handle, index, Some(place as usize))?);
            }
        }
        Ok(found)
    }

    fn describe(&self, device: Device, index: c_uint, instance: Option<usize>) -> Result<Option<Found>, NvmlError> {
        // SAFETY: the signatures are those of `nvml.h`.
        let uuid_of: Symbol<'_, unsafe extern "C" fn(Device, *mut c_char, c_uint) -> c_int> =
            unsafe { self.symbol("nvmlDeviceGetUUID")? };
        let memory_of: Symbol<'_, unsafe extern "C" fn(Device, *mut Memory) -> c_int> =
            unsafe { self.symbol("nvmlDeviceGetMemoryInfo")? };
        let mut uuid = [0 as c_char; UUID_BYTES];
        let mut memory = Memory::default();
        // SAFETY: the buffer has as many bytes as is said.
        let code = unsafe { uuid_of(device, uuid.as_mut_ptr(), UUID_BYTES as c_uint) };
        if code == GPU_IS_LOST {
            return Ok(None);
        }
        self.check("nvmlDeviceGetUUID", code)?;
        // SAFETY: `memory` is valid for writes.
        let code = unsafe { memory_of(device, &mut memory) };
        if code == GPU_IS_LOST {
            return Ok(None);
        }
        self.check("nvmlDeviceGetMemoryInfo", code)?;
        // SAFETY: NVML ends the text with a zero byte.
        let uuid = unsafe { CStr::from_ptr(uuid.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Some(Found { index: index as usize, instance, uuid, memory: memory.total }))
    }

    /// A handle, or `None` if there is nothing at that place (any more).
    fn present(&self, get: impl FnOnce(&mut Device) -> Result<(), NvmlError>) -> Result<Option<Device>, NvmlError> {
        let mut device: Device = ptr::null_mut();
        match get(&mut device) {
            Ok(()) => Ok(Some(device)),
            Err(NvmlError::Failed { code: NOT_FOUND | GPU_IS_LOST, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// # Safety
    /// `T` must be the type that `nvml.h` gives the function.
    unsafe fn symbol<T>(&self, name: &'static str) -> Result<Symbol<'_, T>, NvmlError> {
        // SAFETY: the caller's promise.
        unsafe { self.library.get(name.as_bytes()) }.map_err(|_| NvmlError::Lacks { name })
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), NvmlError> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: the signature is that of `nvml.h`; the text it returns is static.
        let message = unsafe {
            let text: Result<Symbol<'_, unsafe extern "C" fn(c_int) -> *const c_char>, _> =
                self.symbol("nvmlErrorString");
            match text.map(|text| text(code)) {
                Ok(text) if !text.is_null() => CStr::from_ptr(text).to_string_lossy().into_owned(),
                _ => format!("error {code}"),
            }
        };
        Err(NvmlError::Failed { call, code, message })
    }
}

impl NvmlError {
    /// There is nothing to ask: no library, or no driver behind it.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::Absent { .. } | Self::Failed { code: DRIVER_NOT_LOADED, .. })
    }
}

impl Drop for Nvml {
    fn drop(&mut self) {
        // SAFETY: the signature is that of `nvml.h`; it was initialised.
        unsafe {
            if let Ok(shutdown) = self.symbol::<unsafe extern "C" fn() -> c_int>("nvmlShutdown") {
                shutdown();
            }
        }
    }
}
