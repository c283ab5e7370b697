//! Where a network computes, and in which type.

use candle_core::{DType, Device};

use super::FloatType;
use crate::Error;

/// Where a network computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On the CPU by this crate's own kernels, in f32.
    Cpu,
    /// On a CUDA device, counted from 0 among those that the process sees.
    Cuda { device: usize, dtype: FloatType },
    /// On the CPU, with the code that runs on CUDA devices: many times slower than [`Place::Cpu`], and there to test
    /// that code.
    CpuTensors { dtype: FloatType },
}

impl Place {
    /// candle's device and type; `None` for this crate's own kernels.
    ///
    /// # Errors
    /// The program was built without CUDA, or there is no such device.
    pub(crate) fn device(self) -> Result<Option<(Device, DType)>, Error> {
        match self {
            Self::Cpu => Ok(None),
            Self::CpuTensors { dtype } => Ok(Some((Device::Cpu, dtype.into()))),
            Self::Cuda { device, dtype } => Ok(Some((cuda(device)?, dtype.into()))),
        }
    }
}

impl From<FloatType> for DType {
    fn from(stored: FloatType) -> Self {
        match stored {
            FloatType::F32 => Self::F32,
            FloatType::Bf16 => Self::BF16,
            FloatType::F16 => Self::F16,
        }
    }
}

fn cuda(number: usize) -> Result<Device, Error> {
    if !cfg!(feature = "cuda") {
        return Err(Error::argument("this program was built without CUDA").help(
            "build it with `cargo build --release --features cuda`, or give the stage `resources: { gpus: 0 }`",
        ));
    }
    Device::new_cuda(number).map_err(|e| {
        if e.to_string().to_lowercase().contains("out_of_memory") {
            return e.into();
        }
        Error::argument(format!("GPU {number} cannot be used: {e}"))
            .help("`nvidia-smi` and `grlm doctor` show what is there; the driver may be older than this program's CUDA")
    })
}

/// Memory that a GPU could give, in bytes; `None` where that cannot be found out.
#[cfg(feature = "cuda")]
pub fn free_memory(device: &Device) -> Option<usize> {
    let Device::Cuda(device) = device else { return None };
    let stream = device.cuda_stream();
    // What was freed goes back to the device when its stream is waited for.
    stream.synchronize().ok()?;
    Some(stream.context().mem_get_info().ok()?.0)
}

/// There is no GPU.
#[cfg(not(feature = "cuda"))]
pub fn free_memory(_: &Device) -> Option<usize> {
    None
}
