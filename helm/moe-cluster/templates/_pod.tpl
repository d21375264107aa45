{{/* One Ray pod's template. In: root; name (head or a group's); group (its values); gpus. */}}

{{- define "moe-cluster.pod" -}}
{{- $root := .root }}
{{- $values := $root.Values }}
{{- $isHead := eq .name "head" }}
{{- $serves := or $isHead (eq .name "ingress") -}}
metadata:
  labels:
    {{- /* No versions: whatever changes here makes KubeRay start a second cluster. */}}
    {{- include "moe-cluster.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .name }}
    {{- with $values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with .group.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .group.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "moe-cluster.serviceAccountName" $root }}
  automountServiceAccountToken: {{ and $isHead $values.autoscaling.enabled }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "moe-cluster.graceSeconds" $root }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml $values.securityContext.pod | nindent 4 }}
  {{- if or (hasKey $values.model.source "objectStorage") (hasKey $values.model.source "demo") }}
  initContainers:
    - {{- include "moe-cluster.modelInitContainer" $root | nindent 6 }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" $isHead }}
      image: {{ include "moe-cluster.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      ports:
        {{- if $isHead }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        {{- end }}
        {{- if $serves }}
        - {name: serve, containerPort: 8000}
        - {name: serve-grpc, containerPort: 9000}
        {{- end }}
        # KubeRay knows Ray's own metrics by this name.
        - {name: metrics, containerPort: 8080}
        - {name: app-metrics, containerPort: {{ $values.cluster.metrics_port }}}
      env:
        {{- include "moe-cluster.env" . | nindent 8 }}
        {{- if hasKey $values.model.source "huggingFace" }}
        {{- include "moe-cluster.hubEnv" $root | nindent 8 }}
        {{- end }}
      resources:
        {{- include "moe-cluster.resources" . | nindent 8 }}
      securityContext:
        {{- toYaml $values.securityContext.container | nindent 8 }}
      lifecycle:
        preStop:
          exec:
            # All pods of an old cluster are told to stop at once: the head stays while the others drain.
            command: [sleep, {{ include "moe-cluster.hookSeconds" (dict "root" $root "isHead" $isHead) | quote }}]
      {{- include "moe-cluster.probes" . | nindent 6 }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        - name: shared-memory
          mountPath: /dev/shm
        {{- if not (include "moe-cluster.modelInImage" $root) }}
        - {{- include "moe-cluster.modelMount" $root | nindent 10 }}
        {{- end }}
        {{- if and $values.apiKeys.enabled (eq .name "ingress") }}
        - name: api-keys
          mountPath: /etc/moe-cluster/api-keys
          readOnly: true
        {{- end }}
        {{- if and $values.adminKeys.existingSecret (eq .name "ingress") }}
        - name: admin-keys
          mountPath: /etc/moe-cluster/admin-keys
          readOnly: true
        {{- end }}
        {{- with $values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: shared-memory
      emptyDir:
        medium: Memory
        sizeLimit: {{ .group.sharedMemory }}
    {{- if not (include "moe-cluster.modelInImage" $root) }}
    - {{- include "moe-cluster.modelVolume" $root | nindent 6 }}
    {{- end }}
    {{- if and $values.apiKeys.enabled (eq .name "ingress") }}
    - name: api-keys
      secret:
        secretName: {{ include "moe-cluster.apiKeysSecret" $root }}
        defaultMode: 0440
    {{- end }}
    {{- if and $values.adminKeys.existingSecret (eq .name "ingress") }}
    - name: admin-keys
      secret:
        secretName: {{ $values.adminKeys.existingSecret }}
        defaultMode: 0440
    {{- end }}
    {{- with $values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{- define "moe-cluster.env" -}}
{{- $values := .root.Values -}}
- name: HOME
  value: /tmp
- name: RAY_USAGE_STATS_ENABLED
  value: {{ ternary "1" "0" $values.ray.usageStats | quote }}
# Nothing grows over weeks: no list of past tasks in the GCS, logs that rotate (cluster/runtime/bounds.py).
- name: RAY_task_events_report_interval_ms
  value: "0"
- name: RAY_maximum_gcs_destroyed_actor_cached_count
  value: "1000"
- name: RAY_event_stats_print_interval_ms
  value: "86400000"
- name: RAY_ROTATION_MAX_BYTES
  value: "4194304"
- name: RAY_ROTATION_BACKUP_COUNT
  value: "2"
- name: MOE_CLUSTER_DEAD_LOG_BYTES
  value: "67108864"
# From SIGTERM on, Ray lets the node drain for so long.
- name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
  value: {{ ternary "0" (include "moe-cluster.drainSeconds" .root) (eq .name "head") | quote }}
{{- if $values.haproxy.enabled }}
- name: RAY_SERVE_ENABLE_HA_PROXY
  value: "1"
- name: RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD
  value: "0"
- name: RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP
  value: "0"
- name: RAY_SERVE_FREEZE_GC_ON_STARTUP
  value: "1"
- name: RAY_SERVE_HAPROXY_TUNE_BUFSIZE
  value: "65536"
- name: RAY_SERVE_GRPC_MAX_MESSAGE_SIZE
  value: "67108864"
- name: RAY_SERVE_HAPROXY_H2_FE_MAX_CONCURRENT_STREAMS
  value: "10000"
{{- with $values.haproxy.program }}
- name: RAY_SERVE_HAPROXY_BINARY_PATH
  value: {{ . | quote }}
{{- end }}
- name: RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S
  value: {{ $values.haproxy.minDrainingPeriodSeconds | quote }}
- name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S
  value: "1"
- name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S
  value: "20"
- name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
  value: cluster.runtime.proxy.accept_pings
- name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S
  value: {{ $values.haproxy.hardStopAfterSeconds | quote }}
{{- end }}
{{- if not .gpus }}
# A GPU that a pod did not ask for stays out of it, whatever the node's runtime gives by default.
- name: NVIDIA_VISIBLE_DEVICES
  value: void
{{- end }}
{{- with $values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A group's GPUs for each pod: as given, else one for a model that needs it. In: root, group. */}}
{{- define "moe-cluster.gpus" -}}
{{- ternary (ternary 0 1 (eq (include "moe-cluster.isTiny" .root) "true")) (int .group.gpus) (kindIs "invalid" .group.gpus) }}
{{- end }}

{{/* As given, over what the role needs with a model of this size. In: root, name, group, gpus. */}}
{{- define "moe-cluster.resources" -}}
{{- $small := eq (include "moe-cluster.isTiny" .root) "true" }}
{{- $large := has .name (list "attention" "experts") }}
{{- $requests := ternary (dict "cpu" "500m" "memory" "1536Mi") (ternary (dict "cpu" "4" "memory" "16Gi") (dict "cpu" "2" "memory" "4Gi") $large) $small }}
{{- $limits := ternary (dict "cpu" "1" "memory" "3Gi") (dict "memory" (ternary "32Gi" "8Gi" $large)) $small }}
{{- $resources := mergeOverwrite (dict "requests" $requests "limits" $limits) (deepCopy .group.resources) }}
{{- if .gpus }}
{{- range $kind := list "requests" "limits" }}
{{- $_ := set $resources $kind (merge (dict $.root.Values.gpuResource (toString $.gpus)) (default dict (get $resources $kind))) }}
{{- end }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{/* Startup and liveness look at Ray in the pod, never at the model: a long load restarts nothing. */}}
{{- define "moe-cluster.probes" -}}
{{- $probes := .root.Values.probes -}}
startupProbe:
  httpGet: {path: /api/healthz, port: 52365}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ ceil (divf $probes.startup.timeoutSeconds 5) }}
livenessProbe:
  httpGet: {path: /api/healthz, port: 52365}
  {{- toYaml $probes.liveness | nindent 2 }}
readinessProbe:
  {{- if eq .name "ingress" }}
  # SERVING once replicas and shards are up, in this pod's proxy.
  grpc: {port: 9000}
  {{- else }}
  httpGet: {path: /api/healthz, port: 52365}
  {{- end }}
  {{- toYaml $probes.readiness | nindent 2 }}
{{- end }}
