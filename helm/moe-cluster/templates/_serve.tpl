{{/* Serve's configuration: the application and its arguments. */}}

{{/* GPUs of one process: as said, else a whole one where the group has some. In: root, key, group. */}}
{{- define "moe-cluster.gpusPerProcess" -}}
{{- $said := index .root.Values.cluster .key }}
{{- ternary (ternary 1 0 (gt (int (include "moe-cluster.gpus" .)) 0)) $said (kindIs "invalid" $said) }}
{{- end }}

{{- define "moe-cluster.args" -}}
{{- $gpusPerReplica := include "moe-cluster.gpusPerProcess" (dict "root" . "key" "gpus_per_attention_replica" "group" .Values.groups.attention) }}
{{- $gpusPerShard := include "moe-cluster.gpusPerProcess" (dict "root" . "key" "gpus_per_expert_shard" "group" .Values.groups.experts) }}
{{- $args := dict
  "model" (include "moe-cluster.model" .)
  "metrics_host" (ternary "0.0.0.0" "127.0.0.1" .Values.metrics.enabled)
  "gpus_per_attention_replica" (float64 $gpusPerReplica)
  "gpus_per_expert_shard" (float64 $gpusPerShard)
  "ingress_resource" "moe_ingress"
  "attention_resource" "moe_attention"
  "expert_resource" "moe_experts" }}
{{- if and (hasKey .Values.model.source "huggingFace") .Values.model.name (not .Values.cluster.model_id) }}
{{- $_ := set $args "model_id" .Values.model.name }}
{{- end }}
{{- if .Values.apiKeys.enabled }}
{{- $_ := set $args "api_keys_file" (printf "/etc/moe-cluster/api-keys/%s" .Values.apiKeys.key) }}
{{- end }}
{{- if .Values.adminKeys.existingSecret }}
{{- $_ := set $args "admin_keys_file" (printf "/etc/moe-cluster/admin-keys/%s" .Values.adminKeys.key) }}
{{- end }}
{{- range $key, $value := .Values.cluster }}
{{- if not (or (kindIs "invalid" $value) (hasKey $args $key)) }}
{{- $_ := set $args $key $value }}
{{- end }}
{{- end }}
{{- toYaml $args }}
{{- end }}

{{/* "yes" where the API over HTTP is served: unless cluster.http_api is false. */}}
{{- define "moe-cluster.http" -}}
{{- if ne (toString .Values.cluster.http_api) "false" }}yes{{ end }}
{{- end }}

{{/* The host is for HTTP and, in HAProxy's mode, for gRPC too. */}}
{{- define "moe-cluster.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
grpc_options:
  port: 9000
  grpc_servicer_functions:
    - cluster.runtime.proxy.add_inference_service
    - grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server
  enable_reflection: {{ .Values.grpc.reflection }}
applications:
  - name: moe-cluster
    route_prefix: /
    import_path: cluster.app:build
    external_scaler_enabled: {{ kindIs "invalid" .Values.cluster.max_attention_replicas }}
    args:
      {{- include "moe-cluster.args" . | nindent 6 }}
{{- end }}

{{/* Pods and processes that would wait for one another forever: said before anything is installed. */}}
{{- define "moe-cluster.checkPods" -}}
{{- $ingress := .Values.groups.ingress }}
{{- if lt (int .Values.cluster.ingress_replicas) (int $ingress.replicas) }}
{{- fail (printf "groups.ingress has %d pods, cluster.ingress_replicas is %d: a pod without an ingress process never gets ready, set at least as many" (int $ingress.replicas) (int .Values.cluster.ingress_replicas)) }}
{{- end }}
{{- range $name, $group := .Values.groups }}
{{- $replicas := int $group.replicas }}
{{- $most := int (default $replicas $group.maxReplicas) }}
{{- $fewest := ternary $replicas (int $group.minReplicas) (kindIs "invalid" $group.minReplicas) }}
{{- if and $.Values.autoscaling.enabled (or (gt $fewest $replicas) (gt $replicas $most)) }}
{{- fail (printf "groups.%s.replicas is %d, at least minReplicas (%d) and at most maxReplicas (%d) are needed" $name $replicas $fewest $most) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Processes that no node has a GPU for. */}}
{{- define "moe-cluster.checkGpus" -}}
{{- $attention := .Values.groups.attention }}
{{- $experts := .Values.groups.experts }}
{{- $replicas := default .Values.cluster.attention_replicas .Values.cluster.max_attention_replicas }}
{{- $ranks := int (default 1 .Values.cluster.tensor_parallel_size) }}
{{- $processes := mul $ranks $replicas }}
{{- $what := ternary "ranks of attention replicas" "attention replicas" (gt $ranks 1) }}
{{- $checks := list
  (dict "name" "attention" "group" $attention "processes" $processes "together" $ranks "key" "gpus_per_attention_replica" "what" $what)
  (dict "name" "experts" "group" $experts "processes" .Values.cluster.expert_shards "together" 1 "key" "gpus_per_expert_shard" "what" "expert shards") }}
{{- range $checks }}
{{- $each := float64 (include "moe-cluster.gpusPerProcess" (dict "root" $ "key" .key "group" .group)) }}
{{- $pods := int .group.replicas }}
{{- if and $.Values.autoscaling.enabled .group.maxReplicas }}
{{- $pods = int .group.maxReplicas }}
{{- end }}
{{- $gpus := int (include "moe-cluster.gpus" (dict "root" $ "group" .group)) }}
{{- $there := mul $pods $gpus }}
{{- $asked := mulf (float64 .processes) $each }}
{{- if gt $asked (float64 $there) }}
{{- fail (printf "groups.%s has %d pods with %d GPUs each, %d %s with %v GPUs each need %v: more pods or GPUs, fewer processes, or another cluster.%s" .name $pods $gpus (int .processes) .what $each $asked .key) }}
{{- end }}
{{- if and (gt (int .together) 1) (gt (mulf (float64 .together) $each) (float64 $gpus)) }}
{{- fail (printf "groups.%s has pods with %d GPUs each, and the %d ranks of an attention replica are in one pod, with %v GPUs each: more GPUs a pod, or a smaller cluster.tensor_parallel_size" .name $gpus (int .together) $each) }}
{{- end }}
{{- end }}
{{- end }}
