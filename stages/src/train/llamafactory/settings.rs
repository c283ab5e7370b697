//! LlamaFactory's training arguments, from the parameters of `train`: every one of them is mapped, or is an error.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::super::params::{Backend, DecayKind, Deepspeed, Method, Params, Precision, SavedType, TokensChoice};
use crate::{
    ParamIssue, StageError,
    artifact::{ChatTemplate, TokenKind},
    generate::Normalize,
    lm,
};

/// Files of a run, as LlamaFactory is told of them.
pub struct Places<'a> {
    pub model: &'a str,
    /// The folder of the data set and `dataset_info.json`.
    pub data: &'a str,
    pub output: &'a str,
    pub deepspeed: Option<&'a str>,
    /// The checkpoint to go on from.
    pub resume: Option<&'a str>,
    /// Whether there is a data set `valid`.
    pub valid: bool,
}

/// Names of the data sets in `dataset_info.json`.
pub const TRAIN_SET: &str = "grlm_train";
pub const VALID_SET: &str = "grlm_valid";

/// Parameters that LlamaFactory has no counterpart for.
pub fn check(params: &Params) -> Vec<ParamIssue> {
    if params.backend != Backend::Llamafactory {
        return Vec::new();
    }
    let mut issues = Vec::new();
    let mut refuse = |bad: bool, path: &str, message: &str, help: &str| {
        if bad {
            issues.push(ParamIssue::new(path, message).help(help));
        }
    };
    let native = "use `backend: grlm`";
    refuse(
        params.method == Method::Scratch,
        "method",
        "LlamaFactory only trains a model that there is",
        "set `method: full` or `method: lora`, and the `model` to start from (`model: Qwen/Qwen3-0.6B`, say); or use \
         `backend: grlm`",
    );
    refuse(params.dropout > 0.0, "dropout", "LlamaFactory has no dropout of residual branches", native);
    refuse(params.averaging > 0.0, "averaging", "LlamaFactory keeps no average of the weights", native);
    refuse(params.normalize == Normalize::Allowed, "normalize", "LlamaFactory's loss is over all tokens", native);
    let words = matches!(params.tokens, TokensChoice::Words | TokensChoice::Prefixes);
    refuse(words, "tokens", "LlamaFactory uses the model's own tokens", native);
    refuse(
        params.template.fixed() == Some(ChatTemplate::None),
        "template",
        "LlamaFactory has no template that puts nothing around a sample and a plain end behind it",
        "use `qwen3` or `qwen3_nothink`",
    );
    let floored = params.lr_floor > 0.0 && params.schedule == DecayKind::Linear;
    refuse(floored, "lr_floor", "LlamaFactory's linear schedule goes down to 0", "use `schedule: cosine`");
    let scaled = params.method == Method::Lora && params.lora.alpha.fract() != 0.0;
    refuse(scaled, "lora.alpha", "LlamaFactory takes whole numbers only", "round it, or use `backend: grlm`");
    refuse(params.validation.recall, "validation.recall", "LlamaFactory validates by loss", native);
    let saved = match params.llamafactory.precision {
        Precision::F32 => SavedType::F32,
        Precision::Bf16 => SavedType::Bf16,
    };
    refuse(
        params.save_as.is_some_and(|wanted| wanted != saved),
        "save_as",
        "LlamaFactory saves weights in the type that it trains in",
        "set `llamafactory.precision` to the same, or leave `save_as` out",
    );
    for name in params.llamafactory.extra.keys().filter(|name| FIXED.contains(&name.as_str())) {
        refuse(true, &format!("llamafactory.extra.{name}"), "is decided by the stage", "leave it out");
    }
    issues
}

/// Inputs that LlamaFactory has no counterpart for, and parameters that contradict each other because of them.
pub fn check_ports(params: &Params, inputs: &[&str]) -> Vec<ParamIssue> {
    if params.backend != Backend::Llamafactory {
        return Vec::new();
    }
    let mut issues = Vec::new();
    if inputs.contains(&"holdout") {
        let issue = ParamIssue::new("backend", "LlamaFactory cannot validate on held-out items");
        issues.push(issue.help("connect `valid`, or set `validation.share`, in place of the input `holdout`"));
    }
    let validates = inputs.contains(&"valid") || params.validation.share > 0.0;
    if let Some(every) = params.validation.every.filter(|every| validates && params.save_every < *every) {
        let message = format!("LlamaFactory saves when it looks at validation, which is every {every} steps");
        let help = "set `save_every: EVERY` or more, or look more often: `validation.every: SAVE` or less";
        let help = help.replace("EVERY", &every.to_string()).replace("SAVE", &params.save_every.to_string());
        issues.push(ParamIssue::new("save_every", message).help(help));
    }
    issues
}

/// Arguments that `extra` must not replace: the stage depends on them.
const FIXED: [&str; 19] = [
    "stage",
    "do_train",
    "model_name_or_path",
    "adapter_name_or_path",
    "dataset",
    "eval_dataset",
    "dataset_dir",
    "output_dir",
    "resume_from_checkpoint",
    "finetuning_type",
    "template",
    "cutoff_len",
    "save_only_model",
    "save_strategy",
    "save_steps",
    "eval_strategy",
    "eval_steps",
    "load_best_model_at_end",
    "logging_nan_inf_filter",
];

/// LlamaFactory's name of the template that stands around samples.
///
/// # Errors
/// Samples are laid out in a way that LlamaFactory does not know: it would train other tokens than `grlm.json` says.
pub fn template(layout: &lm::Settings) -> Result<&'static str, StageError> {
    if layout.tokens != TokenKind::Model {
        return Err(StageError::params(
            "the model to start from has tokens of whole words, which LlamaFactory has not",
        )
        .help("use `backend: grlm`, or start from a model that was trained with `tokens: model`"));
    }
    match layout.template {
        ChatTemplate::Qwen3 => Ok("qwen3"),
        ChatTemplate::Qwen3Nothink => Ok("qwen3_nothink"),
        ChatTemplate::None => {
            Err(StageError::params("the model to start from has `template: none`, which LlamaFactory has not")
                .help("use `backend: grlm`, or set `template: qwen3_nothink`, which the model then has to learn"))
        }
    }
}

/// The arguments of `llamafactory-cli train`.
pub fn training(params: &Params, template: &str, places: &Places, epoch_steps: u64) -> Map<String, Value> {
    let mut all = Map::new();
    let mut set = |name: &str, value: Value| {
        all.insert(name.to_owned(), value);
    };
    set("model_name_or_path", places.model.into());
    set("stage", "sft".into());
    set("do_train", true.into());
    set("finetuning_type", params.method.name().into());
    if params.method == Method::Lora {
        set("lora_rank", params.lora.rank.into());
        set("lora_alpha", json!(params.lora.alpha as u64));
        set("lora_dropout", number(f64::from(params.lora.dropout)));
        let targets: Vec<&str> = params.lora.targets.iter().map(|t| t.engine().module()).collect();
        set("lora_target", targets.join(",").into());
    }
    if let Some(path) = places.deepspeed {
        set("deepspeed", path.into());
    }

    set("dataset_dir", places.data.into());
    set("dataset", TRAIN_SET.into());
    set("template", template.into());
    set("cutoff_len", params.max_length.into());
    set("train_on_prompt", params.train_on_prompt.into());
    set("packing", params.llamafactory.packing.into());
    set("neat_packing", params.llamafactory.packing.into());
    set("overwrite_cache", true.into());
    set("preprocessing_num_workers", 1.into());

    set("output_dir", places.output.into());
    set("logging_steps", params.llamafactory.logging_steps.into());
    set("save_strategy", "steps".into());
    set("save_steps", params.save_every.into());
    set("save_total_limit", 2.into());
    set("save_only_model", false.into());
    // Else a loss that is not a number is written as the mean of those before.
    set("logging_nan_inf_filter", false.into());
    set("report_to", "none".into());
    set("resume_from_checkpoint", places.resume.map_or(Value::Null, Value::from));

    set("per_device_train_batch_size", params.batch.into());
    set("gradient_accumulation_steps", params.accumulation.into());
    set("learning_rate", number(params.learning_rate()));
    match params.steps {
        Some(steps) => set("max_steps", steps.into()),
        None => set("num_train_epochs", number(params.epochs)),
    }
    let (schedule, arguments) = match (params.schedule, params.lr_floor > 0.0) {
        (DecayKind::Cosine, false) => ("cosine", None),
        (DecayKind::Cosine, true) => ("cosine_with_min_lr", Some(json!({"min_lr_rate": params.lr_floor}))),
        (DecayKind::Linear, _) => ("linear", None),
        (DecayKind::Constant, _) => ("constant_with_warmup", None),
    };
    set("lr_scheduler_type", schedule.into());
    if let Some(arguments) = arguments {
        set("lr_scheduler_kwargs", arguments);
    }
    set("warmup_ratio", number(params.warmup));
    set("optim", "adamw_torch".into());
    set("weight_decay", number(params.weight_decay));
    set("adam_beta1", number(params.beta1));
    set("adam_beta2", number(params.beta2));
    set("adam_epsilon", number(params.epsilon));
    set("max_grad_norm", number(params.clip));
    set("bf16", (params.llamafactory.precision == Precision::Bf16).into());
    set("disable_gradient_checkpointing", (!params.gradient_checkpointing).into());
    set("seed", params.seed.into());
    set("data_seed", params.seed.into());
    set("ddp_timeout", 180_000_000.into());

    if places.valid {
        let every = validation_steps(params, epoch_steps);
        set("eval_dataset", VALID_SET.into());
        set("do_eval", true.into());
        set("eval_strategy", "steps".into());
        set("eval_steps", every.into());
        set("per_device_eval_batch_size", params.batch.into());
        // The best model can only be kept if it is saved when it is looked at.
        set("save_steps", every.into());
        set("load_best_model_at_end", true.into());
        set("metric_for_best_model", "eval_loss".into());
        set("greater_is_better", false.into());
        if let Some(patience) = params.validation.patience {
            set("early_stopping_steps", patience.into());
        }
    }
    for (name, value) in &params.llamafactory.extra {
        set(name, value.clone());
    }
    all
}

/// Steps between two looks at validation.
pub fn validation_steps(params: &Params, epoch_steps: u64) -> u64 {
    params.validation.every.unwrap_or(epoch_steps).max(1)
}

/// The arguments of `llamafactory-cli export`, which merges adapters.
pub fn export(model: &str, adapters: &str, template: &str, to: &str) -> Map<String, Value> {
    let fields = json!({
        "model_name_or_path": model,
        "adapter_name_or_path": adapters,
        "template": template,
        "finetuning_type": "lora",
        "export_dir": to,
        "export_size": 5,
        "export_device": "cpu",
        "export_legacy_format": false,
    });
    match fields {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

/// DeepSpeed's own settings, all left to the trainer but the stage of ZeRO.
pub fn deepspeed(kind: Deepspeed) -> Option<Value> {
    let stage = match kind {
        Deepspeed::None => return None,
        Deepspeed::Zero2 => json!({
            "stage": 2, "overlap_comm": true, "contiguous_gradients": true, "round_robin_gradients": true,
            "allgather_partitions": true, "reduce_scatter": true,
        }),
        Deepspeed::Zero3 => json!({
            "stage": 3, "overlap_comm": true, "contiguous_gradients": true, "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": true,
        }),
    };
    Some(json!({
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": true,
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "zero_optimization": stage,
    }))
}

/// A number as it stands; whole ones stay fractions, as the arguments' types ask for.
fn number(value: f64) -> Value {
    json!(value)
}

/// Flat arguments as YAML. Numbers never have an exponent, which YAML 1.1 would take for text.
pub fn yaml(arguments: &Map<String, Value>) -> String {
    let mut text = String::new();
    for (name, value) in arguments {
        let shown = match value {
            Value::Number(n) if n.is_f64() => {
                let text = format!("{}", n.as_f64().unwrap_or_default());
                if text.contains('.') { text } else { text + ".0" }
            }
            other => other.to_string(),
        };
        let _ = writeln!(text, "{name}: {shown}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::params::Validation;

    fn places() -> Places<'static> {
        Places { model: "/m", data: "/d", output: "/o", deepspeed: None, resume: None, valid: false }
    }

    fn params() -> Params {
        Params { method: Method::Full, backend: Backend::Llamafactory, ..Params::default() }
    }

    #[test]
    fn every_parameter_is_mapped() {
        let mut params = params();
        params.method = Method::Lora;
        params.lr = Some(2e-5);
        params.lr_floor = 0.1;
        params.steps = Some(7);
        params.validation = Validation { share: 0.05, every: Some(3), patience: Some(2), ..Validation::default() };
        params.llamafactory.extra = Map::from_iter([("flash_attn".to_owned(), json!("fa2"))]).into_iter().collect();
        let places = Places { deepspeed: Some("/ds.json"), resume: Some("/o/checkpoint-3"), valid: true, ..places() };
        let text = yaml(&training(&params, "qwen3_nothink", &places, 10));
        for line in [
            "model_name_or_path: \"/m\"",
            "finetuning_type: \"lora\"",
            "lora_target: \"q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj\"",
            "template: \"qwen3_nothink\"",
            "deepspeed: \"/ds.json\"",
            "cutoff_len: 1024",
            "learning_rate: 0.00002",
            "adam_epsilon: 0.00000001",
            "adam_beta2: 0.95",
            "max_grad_norm: 1.0",
            "warmup_ratio: 0.1",
            "max_steps: 7",
            "lr_scheduler_type: \"cosine_with_min_lr\"",
            "lr_scheduler_kwargs: {\"min_lr_rate\":0.1}",
            "disable_gradient_checkpointing: true",
            "bf16: true",
            "resume_from_checkpoint: \"/o/checkpoint-3\"",
            "eval_dataset: \"grlm_valid\"",
            "logging_nan_inf_filter: false",
            "eval_steps: 3",
            "save_steps: 3",
            "early_stopping_steps: 2",
            "flash_attn: \"fa2\"",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("num_train_epochs"));
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error() {
        assert!(check(&params()).is_empty());
        assert!(check(&Params { dropout: 0.1, ..Params::default() }).is_empty(), "not its business");
        type Edit = fn(&mut Params);
        let cases: [(&str, Edit); 7] = [
            ("method", |p| p.method = Method::Scratch),
            ("dropout", |p| p.dropout = 0.1),
            ("template", |p| p.template = super::super::super::params::TemplateChoice::None),
            ("lr_floor", |p| (p.lr_floor, p.schedule) = (0.1, DecayKind::Linear)),
            ("lora.alpha", |p| (p.method, p.lora.alpha) = (Method::Lora, 12.5)),
            ("validation.recall", |p| p.validation.recall = true),
            ("save_as", |p| p.save_as = Some(SavedType::F32)),
        ];
        for (path, edit) in cases {
            let mut params = params();
            edit(&mut params);
            assert_eq!(check(&params).iter().map(|i| i.path.as_str()).collect::<Vec<_>>(), [path]);
        }
        for name in ["output_dir", "save_strategy", "save_steps", "load_best_model_at_end", "eval_strategy"] {
            let mut params = params();
            params.llamafactory.extra.insert(name.into(), json!("no"));
            assert_eq!(check(&params)[0].path, format!("llamafactory.extra.{name}"));
        }
        let bare = Params { backend: Backend::Llamafactory, ..Params::default() };
        let help = check(&bare)[0].help.clone().unwrap();
        assert!(help.contains("`method: full`") && help.contains("`model: Qwen/"), "{help}");
    }

    #[test]
    fn checkpoints_are_not_rarer_than_asked_for() {
        let mut params = params();
        (params.save_every, params.validation.every) = (7, Some(100));
        assert!(check_ports(&params, &["sft"]).is_empty(), "nothing is looked at");
        let issues = check_ports(&params, &["sft", "valid"]);
        assert_eq!(issues[0].path, "save_every");
        assert_eq!(
            issues[0].help.as_deref(),
            Some("set `save_every: 100` or more, or look more often: `validation.every: 7` or less")
        );
        params.validation.share = 0.1;
        assert_eq!(check_ports(&params, &["sft"]).len(), 1);
        params.save_every = 100;
        assert!(check_ports(&params, &["sft"]).is_empty());
        assert_eq!(check_ports(&params, &["sft", "holdout"])[0].path, "backend");
    }

    #[test]
    fn zero_stages_are_what_they_say() {
        assert!(deepspeed(Deepspeed::None).is_none());
        assert_eq!(deepspeed(Deepspeed::Zero3).unwrap()["zero_optimization"]["stage"], 3);
    }
}
