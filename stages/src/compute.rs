//! Where a stage's model computes: the type of numbers on a GPU, what of it belongs to the key of a row, and one model
//! for each device.

use std::sync::{Mutex, OnceLock};

use grlm_nn::qwen3::{FloatType, Place};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Device, StageContext, StageError};

/// [`Dtype::key`] of what the CPU computes.
pub const CPU: &str = "cpu";

/// A floating-point type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    #[default]
    Bf16,
    F16,
    F32,
}

impl Dtype {
    /// Where a model of this type computes when it is given `device`; on the CPU always in f32.
    pub fn on(self, device: Device) -> Place {
        let dtype = match self {
            Self::Bf16 => FloatType::Bf16,
            Self::F16 => FloatType::F16,
            Self::F32 => FloatType::F32,
        };
        match device {
            Device::Cpu => Place::Cpu,
            Device::Cuda(device) => Place::Cuda { device, dtype },
        }
    }

    /// What tells a row's result on this attempt's devices from those of other devices and types.
    pub fn key(self, cx: &StageContext) -> &'static str {
        match self {
            _ if !cx.devices().iter().any(|device| matches!(device, Device::Cuda(_))) => CPU,
            Self::Bf16 => "cuda bf16",
            Self::F16 => "cuda f16",
            Self::F32 => "cuda f32",
        }
    }
}

/// One model for each device; parts of the CPU share theirs.
pub struct PerDevice<M> {
    /// The CPU's, then those of GPUs by number.
    models: Vec<OnceLock<M>>,
    loading: Mutex<()>,
}

impl<M> PerDevice<M> {
    /// Room for the models of an attempt's devices.
    pub fn new(cx: &StageContext) -> Self {
        let count = cx.devices().iter().map(|device| place(*device)).max().unwrap_or(0) + 1;
        Self { models: (0..count).map(|_| OnceLock::new()).collect(), loading: Mutex::default() }
    }

    /// The model of `device`, one of the attempt's; the first that asks loads it, and the others wait.
    ///
    /// # Errors
    /// `load` fails.
    pub fn get<E>(&self, device: Device, load: impl FnOnce() -> Result<M, E>) -> Result<&M, StageError>
    where
        StageError: From<E>,
    {
        let _loading = self.loading.lock().map_err(|_| StageError::bug("loading a model panicked"))?;
        let slot = self.models.get(place(device)).ok_or_else(|| StageError::bug("a device that was not leased"))?;
        match slot.get() {
            Some(model) => Ok(model),
            None => {
                let model = load()?;
                Ok(slot.get_or_init(|| model))
            }
        }
    }
}

fn place(device: Device) -> usize {
    match device {
        Device::Cpu => 0,
        Device::Cuda(number) => number + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StopFlag;

    #[test]
    fn devices_have_models_of_their_own_and_the_cpu_has_one() {
        let devices = vec![Device::Cuda(0), Device::Cuda(2)];
        let cx = StageContext::new(
            Default::default(),
            Default::default(),
            Default::default(),
            1,
            devices,
            StopFlag::default(),
            |_| {},
        );
        let models = PerDevice::new(&cx);
        let loaded = |device, name| *models.get::<StageError>(device, || Ok(name)).unwrap();
        assert_eq!((loaded(Device::Cuda(2), "a"), loaded(Device::Cuda(2), "b")), ("a", "a"));
        assert_eq!((loaded(Device::Cpu, "c"), loaded(Device::Cuda(0), "d")), ("c", "d"));
        assert!(models.get::<StageError>(Device::Cuda(3), || Ok("e")).is_err());
        let failing = PerDevice::<&str>::new(&cx);
        assert!(failing.get(Device::Cpu, || Err(StageError::bug("x"))).is_err());
        assert_eq!(*failing.get::<StageError>(Device::Cpu, || Ok("again")).unwrap(), "again");
        assert_eq!((Dtype::F16.key(&cx), Dtype::Bf16.on(Device::Cpu)), ("cuda f16", Place::Cpu));
    }
}
